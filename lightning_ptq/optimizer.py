"""The optimizer of quantization parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_ptq.graph.units import Chain
from lightning_ptq.quantizers import act_quantizers, weight_quantizers


class Adam(torch.optim.Adam):
    """torch's Adam, except that a step does not look for a CUDA graph that is being captured.

    Where torch was built for CUDA and there is no GPU, that look loads the driver's library anew at every step: 0.3 ms,
    as long as the fused update itself takes. Where a graph is captured (`gpu_replay.py`), the fused update is fit for
    it: its rates are tensors then. The name is torch's own from 2.11 to 2.14; where it is another, the look stays.

    Attributes:
        differentiated: the step in progress has its gradients already, from a recording that was played back.
        stepped: it was taken already; `step` takes none then.
    """

    differentiated = stepped = False

    def _accelerator_graph_capture_health_check(self) -> None:
        pass

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compute the loss by `closure`, if there is one, and take the step unless that took it."""
        loss = None if closure is None else closure()
        if not self.stepped:
            super().step()
        return loss


def optimizer_of(student: Chain) -> Adam:
    """One Adam over all quantization parameters of `student`, in groups "rounding", "scales" and "corrections".

    Those without gradients are skipped at each step. The rates are the caller's to set; they start at 0.
    """
    weights = weight_quantizers(student)
    groups: list[dict[str, Any]] = [
        {"params": [p for q in weights for p in q.roundings], "name": "rounding"},
        {"params": [q.log_scale for q in act_quantizers(student)], "name": "scales"},
        # A short memory: there are few steps, and a channel's gradient changes its size with them.
        {"params": [p for q in weights for p in q.corrections], "name": "corrections", "betas": (0.9, 0.99)},
    ]
    return Adam([group for group in groups if group["params"]], lr=0.0, fused=True)
