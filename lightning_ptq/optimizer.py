"""The optimizer of quantization parameters."""

from __future__ import annotations

import torch


class Adam(torch.optim.Adam):
    """torch's Adam, except that a step does not look for a CUDA graph that is being captured.

    Where torch was built for CUDA and there is no GPU, that look loads the driver's library anew at every step: 0.3 ms,
    as long as the fused update itself takes. Nothing here captures graphs. The name is torch's own from 2.11 to 2.14;
    where it is another, the look stays.
    """

    def _accelerator_graph_capture_health_check(self) -> None:
        pass
