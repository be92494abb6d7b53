"""Quantizers: the modules that hold scales, zero points and rounding.

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


class WeightQuantizer(nn.Module):
    """Weight quantizer, per channel or per tensor, rounding to nearest or by AdaRound, with learned corrections.

    While gradients flow to `alpha` the rounding is soft (AdaRound's rectified sigmoid); otherwise it is hard. A fresh
    `alpha` rounds to nearest, so a network that has ranges but no calibration is the round-to-nearest baseline.
    Integers are decided on the grid of `scale`; `log_gain` then rescales them, and `bias_shift` moves the layer's
    bias. Both start at zero.

    Args:
        shape: the weight's shape, output channels at `axis`.
        bits: 2 to 8.
        per_channel: one scale for each output channel, otherwise one for all.
        symmetric: signed grid with zero point 0.
        rounding: "nearest" (nothing to learn) or "adaround".
    """

    def __init__(
        self,
        shape: torch.Size,
        bits: int,
        *,
        per_channel: bool = True,
        symmetric: bool = False,
        rounding: str = "nearest",
        axis: int = 0,
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.per_channel, self.axis = bits, symmetric, per_channel, axis
        self.qmin, self.qmax = F.integer_range(bits, symmetric)
        channels = [size if dim == axis and per_channel else 1 for dim, size in enumerate(shape)]
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", torch.zeros(channels))
        self.register_buffer("ready", torch.tensor(False))
        self.alpha = nn.Parameter(torch.zeros(shape), requires_grad=False) if rounding == "adaround" else None
        self.log_gain = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.bias_shift = nn.Parameter(torch.zeros(shape[axis]), requires_grad=False)
        self.nearest = False  # True only inside `initial_ranges`: the baseline's view of this layer
        self.enabled = False
        # Set by `hold`. The soft weight is low + step * h, and the integers are those of a rounding that is done.
        self._soft: tuple[Tensor, Tensor] | None = None
        self._hard: Tensor | None = None
        self._h: Tensor | None = None
        self.scale: Tensor
        self.zero_point: Tensor
        self.ready: Tensor

    @torch.no_grad()
    def set_range(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Start from this range and, for AdaRound, from the fractional part of every weight."""
        self.scale.copy_(scale.view_as(self.scale))
        self.zero_point.copy_(zero_point.view_as(self.zero_point))
        self.reset(weight)
        self.ready.fill_(True)
        self.enabled = True

    @property
    def corrections(self) -> tuple[nn.Parameter, nn.Parameter]:
        """(log_gain, bias_shift)."""
        return self.log_gain, self.bias_shift

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Forget what was learned."""
        for correction in self.corrections:
            correction.zero_()
        if self.alpha is not None:
            position = weight / self.scale
            # Ties go where round() takes them, so that a fresh alpha is exactly round-to-nearest.
            fraction = position - position.floor()
            alpha = F.inverse_rectified_sigmoid(fraction)
            up = position.round() > position.floor()
            self.alpha.copy_(torch.where(up, alpha.clamp(min=1e-6), alpha.clamp(max=-1e-6)))

    def integers(self, weight: Tensor, *, nearest: bool = False) -> Tensor:
        """Integer values (as float32) of `weight` with hard rounding; `nearest=True` ignores what was learned."""
        weight = weight.float()
        if self.alpha is None or nearest or self.nearest:
            return F.quantize(weight, self.scale, self.zero_point, self.qmin, self.qmax)
        up = (weight / self.scale).floor() + (self.alpha >= 0)
        return (up + self.zero_point).clamp(self.qmin, self.qmax)

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """Work out once what no step changes until `release`: as long as weight, scale and, if hard, alpha stay."""
        if self.enabled and self.is_soft:
            self._soft = self._soft_parts(weight)
        elif self.enabled:
            self._hard = self(weight, gain=False)

    def release(self) -> None:
        """Forget what `hold` worked out."""
        self._soft = self._hard = self._h = None

    def take_rounding(self) -> Tensor:
        """h of every weight in [0, 1] as the last soft `forward` used it, with its gradient; to be taken once."""
        h, self._h = self._h, None
        assert h is not None
        return h

    @property
    def is_soft(self) -> bool:
        """Whether the rounding is being learned."""
        return self.alpha is not None and self.alpha.requires_grad and not self.nearest

    def _soft_parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(low, step): the weight is low + step * h before its gain. Beyond the grid's ends, step is 0."""
        down = (weight.float() / self.scale).floor() + self.zero_point
        inside = (down >= self.qmin) & (down < self.qmax)
        low = F.dequantize(down.clamp(self.qmin, self.qmax), self.scale, self.zero_point)
        return low, self.scale * inside

    def forward(self, weight: Tensor, gain: bool = True) -> Tensor:
        """The weight as quantized now, in float32; `gain=False` leaves the gain of a hard weight to the caller."""
        if not self.enabled:
            return weight
        with F.in_float32(weight.device):
            if self.is_soft and torch.is_grad_enabled():
                assert self.alpha is not None
                low, step = self._soft or self._soft_parts(weight)
                soft, self._h = F.soft_round(self.alpha, low, step, self.log_gain)
                return soft
            if self._hard is not None and not gain and not self.nearest:
                return self._hard
            return F.dequantize(self.integers(weight), self.effective_scale if gain else self.scale, self.zero_point)

    @property
    def effective_scale(self) -> Tensor:
        """Scale that the integers are multiplied by, shape of `scale`."""
        return self.scale if self.nearest else self.scale * self.log_gain.exp()

    def correct(self, bias: Tensor | None) -> Tensor | None:
        """The layer's bias (O,) with what was learned about it; None stays None while nothing is quantized."""
        if not self.enabled or self.nearest:
            return bias
        return self.bias_shift if bias is None else bias + self.bias_shift

    @torch.no_grad()
    def flipped(self, weight: Tensor) -> int:
        """Number of weights whose learned rounding differs from rounding to nearest."""
        return int((self.integers(weight) != self.integers(weight, nearest=True)).sum())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.enabled = bool(self.ready)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}, per_channel={self.per_channel}"


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
