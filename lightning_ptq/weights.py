"""Weight quantizers: scales, the three ways of rounding, and learned corrections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_ptq import functional as F
from lightning_ptq import soft_rounding as S

# How far from the boundary between down and up AdaRound's weights start where they are rounded anew, in steps.
_MARGIN = 0.25


class WeightQuantizer(nn.Module):
    """Weight quantizer, per channel or per tensor, that rounds to nearest, with learned corrections.

    Integers are decided on the grid of `scale`; `log_gain` then rescales them, and `bias_shift` moves the layer's
    bias. Both start at zero. Subclasses learn the rounding; as long as they have learned nothing they round to nearest,
    so a network that has ranges but no calibration is the round-to-nearest baseline.

    Args:
        shape: the weight's shape, (O, ...): output channels come first.
        bits: 2 to 8.
        per_channel: one scale for each output channel, otherwise one for all.
        symmetric: signed grid with zero point 0.
    """

    def __init__(self, shape: torch.Size, bits: int, *, per_channel: bool = True, symmetric: bool = False) -> None:
        super().__init__()
        self.bits, self.symmetric, self.per_channel = bits, symmetric, per_channel
        self.qmin, self.qmax = F.integer_range(bits, symmetric)
        channels = [shape[0] if per_channel else 1, *[1] * (len(shape) - 1)]
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", torch.zeros(channels))
        self.register_buffer("ready", torch.tensor(False))
        self.log_gain = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.bias_shift = nn.Parameter(torch.zeros(shape[0]), requires_grad=False)
        self.nearest = False  # True only inside `initial_ranges`: the baseline's view of this layer
        self.enabled = False
        self._hard: Tensor | None = None  # set by `hold`
        self.scale: Tensor
        self.zero_point: Tensor
        self.ready: Tensor

    def set_bits(self, bits: int) -> None:
        """Have so many bits; to be called before there is a range."""
        self.bits = bits
        self.qmin, self.qmax = F.integer_range(bits, self.symmetric)

    @property
    def corrections(self) -> tuple[nn.Parameter, nn.Parameter]:
        """(log_gain, bias_shift)."""
        return self.log_gain, self.bias_shift

    @property
    def roundings(self) -> tuple[nn.Parameter, ...]:
        """What decides the rounding, if it can be learned."""
        return ()

    @property
    def is_learned(self) -> bool:
        """Whether the rounding is being learned."""
        return not self.nearest and any(parameter.requires_grad for parameter in self.roundings)

    @torch.no_grad()
    def set_range(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Start from this range, rounding to nearest."""
        self.scale.copy_(scale.view_as(self.scale))
        self.zero_point.copy_(zero_point.view_as(self.zero_point))
        self.reset(weight)
        self.ready.fill_(True)
        self.enabled = True

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Forget what was learned."""
        self.release()
        for parameter in (*self.corrections, *self.roundings):
            parameter.zero_()

    def reopen(self, weight: Tensor) -> None:
        """Make a rounding that was decided ready to be learned once more, from where it stands."""

    def integers(self, weight: Tensor, *, nearest: bool = False) -> Tensor:
        """Integer values (as float32) of `weight` with hard rounding; `nearest=True` ignores what was learned."""
        weight = weight.float()
        if nearest or self.nearest:
            return F.quantize(weight, self.scale, self.zero_point, self.qmin, self.qmax)
        return self._rounded(weight)

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """Work out once what no step changes until `release`: as long as the weight, its scale and, unless it is
        learned, its rounding stay."""
        if self.enabled and not self.is_learned:
            self._hard = self(weight, gain=False)

    def release(self) -> None:
        """Forget what `hold` worked out."""
        self._hard = None

    def forward(self, weight: Tensor, gain: bool = True) -> Tensor:
        """The weight as quantized now, in float32; `gain=False` leaves the gain of a hard weight to the caller."""
        if not self.enabled:
            return weight
        with F.in_float32(weight.device):
            if self.is_learned and torch.is_grad_enabled():
                return self._learning(weight.float())
            if self._hard is not None and not gain and not self.nearest:
                return self._hard
            return F.dequantize(self.integers(weight), self.effective_scale if gain else self.scale, self.zero_point)

    def _rounded(self, weight: Tensor) -> Tensor:
        """`integers` as learned."""
        return F.quantize(weight, self.scale, self.zero_point, self.qmin, self.qmax)

    def _learning(self, weight: Tensor) -> Tensor:
        """The weight, gain included, with gradients to `roundings` and `log_gain`."""
        raise NotImplementedError

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


class AdaRound(WeightQuantizer):
    """Every weight is rounded down or up, as the sign of its `alpha` says (Nagel et al. 2020).

    While gradients flow to `alpha` the rounding is soft (rectified sigmoid), or, if `straight`, hard with the gradient
    of the identity: soft rounding starts from undecided weights, and a network that was calibrated has none left.
    """

    def __init__(self, shape: torch.Size, bits: int, *, per_channel: bool = True, symmetric: bool = False) -> None:
        super().__init__(shape, bits, per_channel=per_channel, symmetric=symmetric)
        self.alpha = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.straight = False
        self._parts: tuple[Tensor, Tensor] | None = None  # set by `hold`
        self._h: Tensor | None = None

    @property
    def roundings(self) -> tuple[nn.Parameter, ...]:
        return (self.alpha,)

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        super().reset(weight)
        position = weight / self.scale
        # Ties go where round() takes them, so that a fresh alpha is exactly round-to-nearest.
        fraction = position - position.floor()
        alpha = S.inverse_rectified_sigmoid(fraction)
        up = position.round() > position.floor()
        self.alpha.copy_(torch.where(up, alpha.clamp(min=1e-6), alpha.clamp(max=-1e-6)))

    @torch.no_grad()
    def reopen(self, weight: Tensor) -> None:
        """`alpha` becomes the weight's distance to the middle of its two integers, in steps, on the side decided for.

        It is `_MARGIN` at least, so that what was decided against the nearest does not tip over at once.
        """
        position = weight / self.scale
        middle = position - position.floor() - 0.5
        up = middle.clamp(min=_MARGIN)
        self.alpha.copy_(torch.where(self.alpha >= 0, up, middle.clamp(max=-_MARGIN)))

    def _rounded(self, weight: Tensor) -> Tensor:
        up = (weight / self.scale).floor() + (self.alpha >= 0)
        return (up + self.zero_point).clamp(self.qmin, self.qmax)

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        if self.enabled and self.is_learned:
            self._parts = self._ends(weight.float())
        super().hold(weight)

    def release(self) -> None:
        super().release()
        self._parts = self._h = None

    def take_rounding(self) -> Tensor:
        """h of every weight in [0, 1] as the last soft `forward` used it, with its gradient; to be taken once."""
        h, self._h = self._h, None
        assert h is not None
        return h

    def _ends(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(low, step): the weight is low + step * h before its gain. Beyond the grid's ends, step is 0."""
        down = (weight / self.scale).floor() + self.zero_point
        inside = (down >= self.qmin) & (down < self.qmax)
        low = F.dequantize(down.clamp(self.qmin, self.qmax), self.scale, self.zero_point)
        return low, self.scale * inside

    def _learning(self, weight: Tensor) -> Tensor:
        low, step = self._parts or self._ends(weight)
        if self.straight:
            up = S.straight_through((self.alpha >= 0).float(), self.alpha)
            return torch.addcmul(low, step, up) * self.log_gain.exp()
        soft, self._h = S.soft_round(self.alpha, low, step, self.log_gain)
        return soft


class FlexRound(WeightQuantizer):
    """Every weight is divided before it is rounded to nearest, and its divisor is learned (Lee et al. 2023, eq. 2).

    The divisor is the product of one number for each weight, one for each output and one for each input channel. Their
    logarithms are learned, in units that move the largest weights by about one step, so that one rate fits all bits.
    Weights may move by several steps, large ones more easily than small ones. Gradients pass the rounding unchanged.
    The scale outside the rounding is that of the range times the gain.
    """

    def __init__(self, shape: torch.Size, bits: int, *, per_channel: bool = True, symmetric: bool = False) -> None:
        super().__init__(shape, bits, per_channel=per_channel, symmetric=symmetric)
        ones = [1] * (len(shape) - 2)
        sizes = (shape, (shape[0], 1, *ones), (1, shape[1], *ones))
        self.log_element, self.log_output, self.log_input = (
            nn.Parameter(torch.zeros(size), requires_grad=False) for size in sizes
        )

    @property
    def roundings(self) -> tuple[nn.Parameter, ...]:
        return self.log_element, self.log_output, self.log_input

    def _position(self, weight: Tensor) -> Tensor:
        log_divisor = (self.log_element + self.log_output + self.log_input) / 2.0 ** (self.bits - 1)
        return weight / self.scale * (-log_divisor).exp()

    def _rounded(self, weight: Tensor) -> Tensor:
        return self._integers_at(self._position(weight))

    def _integers_at(self, position: Tensor) -> Tensor:
        return (position.round() + self.zero_point).clamp(self.qmin, self.qmax)

    def _learning(self, weight: Tensor) -> Tensor:
        position = self._position(weight)
        low, high = self.qmin - self.zero_point - 0.5, self.qmax - self.zero_point + 0.5
        integers = S.straight_through(self._integers_at(position.detach()), position.clamp(low, high))
        return F.dequantize(integers, self.effective_scale, self.zero_point)


ROUNDINGS: dict[str, type[WeightQuantizer]] = {
    "nearest": WeightQuantizer,
    "adaround": AdaRound,
    "flexround": FlexRound,
}
