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
from lightning_ptq.config import RangeName
from lightning_ptq.drop import DropMask
from lightning_ptq.ranges import Histogram
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

    def set_bits(self, bits: int) -> None:
        """Have so many bits; to be called before there is a range."""
        self.bits = bits
        self.qmin, self.qmax = F.integer_range(bits, self.symmetric)

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

    def start(self, seen: Histogram, method: RangeName) -> None:
        """Start from the range of what was `seen`, by the estimator called `method`."""
        self.set_range(*seen.qparams(method, self.bits, self.symmetric))

    def _mirror(self) -> None:
        zero_point = float(self.zero_point)
        self.enabled, self.low, self.high = bool(self.ready), self.qmin - zero_point, self.qmax - zero_point

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        with F.in_float32(x.device):
            keep = self.drop.keep(x) if self.drop is not None and torch.is_grad_enabled() else None
            y = F.fake_quantize(x, self.log_scale, self.low, self.high, keep)
        return F.saturated(y, x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._mirror()

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}"


class LogQuantizer(ActQuantizer):
    """Activation quantizer of positive values on the grid scale * 2^-k, k = 0 ... 2^bits - 1 (Lin et al. 2022, eq. 7).

    For what a softmax gives: most probabilities are small, and there the grid is fine. The scale is the largest value
    seen and can be learned. Gradients pass to x unchanged where x is inside the grid, and to the scale through y.

    Shape: any -> the same.
    """

    def start(self, seen: Histogram, method: RangeName) -> None:
        """Start from the largest value that was `seen`, whatever the estimator."""
        self.set_range(torch.tensor(max(seen.high, F.MIN_SCALE)), torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        with F.in_float32(x.device):
            value, steps = x.float(), 2**self.bits - 1
            scale = self.log_scale.exp()
            octaves = -(value.detach() / scale.detach()).clamp(min=torch.finfo(torch.float32).tiny).log2()  # k, real
            inside = (octaves > -0.5) & (octaves < steps + 0.5)
            y = octaves.round().clamp(0, steps).neg().exp2() * scale
            if torch.is_grad_enabled():
                y = y + (value - value.detach()) * inside
                keep = self.drop.keep(value) if self.drop is not None else None
                if keep is not None:
                    y = torch.lerp(value, y, keep.float() if isinstance(keep, Tensor) else keep.mask(value))
        return F.saturated(y, x.dtype)


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
