"""What to quantize and to how many bits: one frozen, validated `QuantConfig`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from lightning_ptq.errors import PTQError

RangeName = Literal["minmax", "mse", "percentile"]
EdgePolicy = Literal["8bit", "same"]
Budget = Literal["bops", "memory", "size"]
SoftmaxGrid = Literal["uniform", "log2"]
NormScaling = Literal["ranges", "smooth", "none"]
PlacementRule = Literal["paper", "hardware"]
PairScaling = Literal["smooth", "none"]
Granularity = Literal["layer", "block", "stage", "net"]

WEIGHT_BITS = range(2, 9)
ACT_BITS = (*range(2, 9), 16)
EDGE_BITS = 8


@dataclass(frozen=True)
class LayerBits:
    """Bits of one layer: of its weights and of the activation that it reads.

    Attributes:
        fixed: those of the two that mixed precision does not choose.
    """

    weight_bits: int
    act_bits: int
    fixed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class QuantConfig:
    """Bits, ranges and placement of every quantizer; frozen and checked when made.

    Args:
        weight_bits: bits of the weights, 2 to 8.
        act_bits: bits of the activations, 2 to 8 or 16.
        weight_per: one range for each output "channel" or one for the whole "tensor".
        weight_symmetric: signed grid with zero point 0 for weights; otherwise asymmetric.
        act_symmetric: the same for activations.
        weight_range: range estimator of the weights.
        act_range: range estimator of the activations.
        edges: "8bit" keeps the weights of the first and last layer, the network's input and the last
            layer's input at 8 bits (the convention of BRECQ, QDrop and PD-Quant); "same" does not.
        placement: "paper" puts one quantizer on every tensor that a quantizable layer reads; "hardware" also around
            additions, concatenations and average pools and behind layers, as integer kernels need them.
        norms: how the channels of a layer norm's output, where linear layers alone read it, are brought together before
            they share one scale: to one range ("ranges"), halfway ("smooth") or not ("none"); see `equalize.py`.
        pairs: the same for what lies between two layers, with at most a ReLU there: halfway ("smooth") or not ("none").
        softmax: grid of what a softmax gives: "uniform", or powers of two ("log2"), which resolve small probabilities;
            simulation only, no runtime has it.
        average_bits: choose the bits that neither `edges` nor `overrides` give from 2, 3, 4, 5, 6 and 8, by what they
            cost on the calibration images (`allocation.py`), where they take no more than so many bits throughout; None
            gives all of them `weight_bits` and `act_bits`.
        budget: what it is that they take: "bops", multiply-adds times the bits of both factors; "memory", the bits of
            the weights and of the activations of one image; or "size", the bits of the weights, while activations have
            `act_bits`.
        overrides: layer-name pattern -> {"weight_bits": b, "act_bits": b}; the last match wins, and wins over
            `edges`. `act_bits` is the width of the activation that the layer reads.

    Raises:
        PTQError: bits outside the range, an unknown option, or an override with an unknown key.
    """

    weight_bits: int = 4
    act_bits: int = 4
    weight_per: Literal["channel", "tensor"] = "channel"
    weight_symmetric: bool = False
    act_symmetric: bool = False
    weight_range: RangeName = "mse"
    act_range: RangeName = "mse"
    edges: EdgePolicy = "8bit"
    placement: PlacementRule = "paper"
    norms: NormScaling = "ranges"
    pairs: PairScaling = "none"
    softmax: SoftmaxGrid = "uniform"
    average_bits: float | None = None
    budget: Budget = "bops"
    overrides: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, "weight_bits")
        check_bits(self.act_bits, "act_bits")
        check_option(self.weight_per, ("channel", "tensor"), "weight_per")
        check_option(self.weight_range, get_args(RangeName), "weight_range")
        check_option(self.act_range, get_args(RangeName), "act_range")
        check_option(self.edges, get_args(EdgePolicy), "edges")
        check_option(self.placement, get_args(PlacementRule), "placement")
        if self.placement == "hardware" and not self.weight_symmetric:
            raise PTQError(
                "placement='hardware' needs weight_symmetric=True, since an integer kernel has one zero point for all "
                "channels."
            )
        check_option(self.norms, get_args(NormScaling), "norms")
        check_option(self.pairs, get_args(PairScaling), "pairs")
        check_option(self.softmax, get_args(SoftmaxGrid), "softmax")
        check_option(self.budget, get_args(Budget), "budget")
        average = self.average_bits
        if average is not None and not (isinstance(average, int | float) and 2 <= average <= 8):
            raise PTQError(f"average_bits={average!r} is no number from 2 to 8. Leave it out for uniform bits.")
        for pattern, bits in self.overrides.items():
            for key, value in bits.items():
                check_option(key, ("weight_bits", "act_bits"), f"overrides[{pattern!r}]")
                check_bits(value, key, where=f"overrides[{pattern!r}].")

    def bits_of(self, layer: str, *, first: bool, last: bool) -> LayerBits:
        """Bits of the layer called `layer`, given whether it is a first or last layer of the network."""
        edge = self.edges == "8bit" and (first or last)
        bits = {
            "weight_bits": EDGE_BITS if edge else self.weight_bits,
            "act_bits": EDGE_BITS if edge else self.act_bits,
        }
        fixed = {"weight_bits", "act_bits"} if edge else set[str]()
        for pattern, override in self.overrides.items():
            if fnmatchcase(layer, pattern):
                bits.update(override)
                fixed.update(override)
        return LayerBits(**bits, fixed=frozenset(fixed))

    def check_overrides(self, layers: list[str]) -> None:
        """Raise `PTQError` for an override pattern that names none of `layers`."""
        for pattern in self.overrides:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise PTQError(
                    f"overrides: pattern {pattern!r} matches none of the {len(layers)} quantized layers "
                    f"({', '.join(layers[:6])}{', ...' if len(layers) > 6 else ''}). "
                    "Run `lightning-ptq plan` to see every layer's name."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as checkpoints need them."""
        return asdict(self)


def check_bits(value: int, name: str, *, where: str = "") -> None:
    """Raise `PTQError` unless `value` is a bit-width that this library simulates."""
    allowed = WEIGHT_BITS if name == "weight_bits" else ACT_BITS
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        rule = "2 to 8" if name == "weight_bits" else "2 to 8, or 16"
        raise PTQError(f"{where}{name}={value!r} is not a supported width. Use {rule}.")


def check_option(value: object, allowed: tuple[object, ...], name: str) -> None:
    """Raise `PTQError` unless `value` is one of `allowed`."""
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise PTQError(f"{name}={value!r} is unknown. Choose one of {options}.")
