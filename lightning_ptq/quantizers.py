"""Activation quantizers, and what is done to all quantizers of a network.

Parameters are created when the module is made, so checkpoints, optimizers and other processes see them from the
start; their values come later from range estimators (`ranges.py`). Until then a quantizer passes floats through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ptq import functional as F
from lightning_ptq.drop import DropMask
from lightning_ptq.weights import WeightQuantizer


class ActQuantizer(nn.Module):
    """Per-tensor activation quantizer with a scale that can be learned (LSQ) and element-wise drop (QDrop).

    Args:
        bits: 2 to 8 or 16.
        symmetric: signed grid with zero point 0; otherwise asymmetric.

    Shape: any -> the same.
    """

    def __init__(self, bits: int, symmetric: bool = False) -> None:
        super().__init__()
        self.bits, self.symmetric = bits, symmetric
        self.qmin, self.qmax = F.integer_range(bits, symmetric)
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(()))
        self.register_buffer("initial_log_scale", torch.zeros(()))
        self.register_buffer("ready", torch.tensor(False))
        self.drop: DropMask | None = None  # set while the quantizer's unit is calibrated
        # Host copies of `ready` and of the grid's ends: reading a device tensor in forward would synchronise.
        self.enabled, self.low, self.high = False, float(self.qmin), float(self.qmax)
        self.zero_point: Tensor
        self.initial_log_scale: Tensor
        self.ready: Tensor

    @property
    def scale(self) -> Tensor:
        """Current scale, shape ()."""
        return self.log_scale.exp()

    @torch.no_grad()
    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Start from this scale and zero point, both shape ()."""
        self.log_scale.copy_(scale.log())
        self.initial_log_scale.copy_(self.log_scale)
        self.zero_point.copy_(zero_point)
        self.ready.fill_(True)
        self._mirror()

    def _mirror(self) -> None:
        zero_point = float(self.zero_point)
        self.enabled, self.low, self.high = bool(self.ready), self.qmin - zero_point, self.qmax - zero_point

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        with F.in_float32(x.device):
            keep = self.drop.keep(x) if self.drop is not None and torch.is_grad_enabled() else None
            y = F.fake_quantize(x, self.log_scale, self.low, self.high, keep)
        return y.to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._mirror()

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}"


def act_quantizers(module: nn.Module) -> list[ActQuantizer]:
    """Every activation quantizer below `module`, in order."""
    return [m for m in module.modules() if isinstance(m, ActQuantizer)]


def weight_quantizers(module: nn.Module) -> list[WeightQuantizer]:
    """Every weight quantizer below `module`, in order."""
    return [m for m in module.modules() if isinstance(m, WeightQuantizer)]


def forget_ranges(module: nn.Module) -> None:
    """Put every quantizer below `module` back to where it has no range and passes floats through."""
    quantizers: list[ActQuantizer | WeightQuantizer] = [*act_quantizers(module), *weight_quantizers(module)]
    for q in quantizers:
        q.ready.fill_(False)
        q.enabled = False


@contextmanager
def initial_ranges(module: nn.Module) -> Iterator[None]:
    """Inside, every quantizer below `module` is as before calibration: initial scales, rounding to nearest."""
    acts, weights = act_quantizers(module), weight_quantizers(module)
    learned = [q.log_scale.detach().clone() for q in acts]
    try:
        for act in acts:
            act.log_scale.data.copy_(act.initial_log_scale)
        for weight in weights:
            weight.nearest = True
        yield
    finally:
        for act, log_scale in zip(acts, learned, strict=True):
            act.log_scale.data.copy_(log_scale)
        for weight in weights:
            weight.nearest = False


@contextmanager
def float_mode(module: nn.Module) -> Iterator[None]:
    """Inside, every quantizer below `module` passes floats through."""
    quantizers: list[ActQuantizer | WeightQuantizer] = [*act_quantizers(module), *weight_quantizers(module)]
    enabled = [q.enabled for q in quantizers]
    try:
        for q in quantizers:
            q.enabled = False
        yield
    finally:
        for q, was in zip(quantizers, enabled, strict=True):
            q.enabled = was


def scales_are_finite(module: nn.Module) -> bool:
    """Whether every activation scale below `module` is a finite positive number."""
    return all(
        math.isfinite(scale) and scale > 0 for scale in (float(q.scale.detach()) for q in act_quantizers(module))
    )
