"""Our Adam against torch's."""

from typing import Any

import pytest
import torch

from lightning_ptq.optimizer import Adam


def test_it_is_torch_s_adam_and_asks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    start, gradients = torch.randn(7), torch.randn(5, 7)
    ends = []
    for kind in (torch.optim.Adam, Adam):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=0.1, fused=True)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)

    def asked(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("looked for a GPU")

    for module, name in ((torch.accelerator, "current_accelerator"), (torch.cuda, "is_available")):
        monkeypatch.setattr(module, name, asked)
    optimizer.step()
    if hasattr(torch.optim.Adam, "_accelerator_graph_capture_health_check"):
        with pytest.raises(AssertionError, match="looked"):
            torch.optim.Adam([parameter], lr=0.1, fused=True).step()
