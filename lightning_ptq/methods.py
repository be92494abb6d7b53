"""Calibration methods as points in one small space, and the rule from the step budget to the learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_ptq.config import Granularity, check_option
from lightning_ptq.errors import PTQError

UnitInput = Literal["fp", "quant", "mix"]
Rounding = Literal["nearest", "adaround", "flexround"]
ScaleLearning = Literal["none", "joint", "after"]
Weighting = Literal["equal", "fisher"]
MethodName = Literal["nearest", "adaround", "brecq", "qdrop", "pdquant", "flexround"]

# Share of a unit's steps after which "after" starts to learn scales: BRECQ gives 20k steps to rounding, 5k to scales.
_AFTER = 0.8
# The budget for which the papers state their rates, and the rates there: the papers' 1e-3 for rounding, and for scales
# about what their 4e-5 is in proportion to a typical scale, since here the logarithm is learned.
_REFERENCE_STEPS = 20_000
_REFERENCE_ROUNDING_LR = 1e-3
_REFERENCE_SCALE_LR = 1e-4


@dataclass(frozen=True)
class Method:
    """One calibration method.

    Args:
        granularity: how large a reconstruction unit is.
        input: what a unit reads while it is calibrated: the teacher's activations ("fp"), the student's ("quant"), or
            an element-wise random mix of both ("mix").
        rounding: "nearest", or learned: up or down ("adaround"), or by learned divisors ("flexround").
        scales: activation scales are fixed ("none"), learned with the rounding ("joint") or after it ("after").
        drop: probability that an element stays in full precision, in a mixed input and in every activation quantizer
            of the unit.
        drop_until: share of a unit's steps in which elements are dropped and inputs mixed; in the rest of them the unit
            sees what it will see.
        weighting: the channels of a unit's output count alike in the reconstruction loss ("equal"), or by how much
            the network's output depends on them ("fisher", see `importance.py`).
        corrections: a gain of the quantized weights and a shift of the bias are learned for each output channel: in
            units together with activation scales, and in the epoch of the whole network. Where nothing is learned,
            biases are corrected by the shift of each channel's mean instead (`bias.py`).
        prediction: gradient of the prediction difference (PD-Quant) at the unit's output, relative to that of the
            reconstruction; 0 leaves the term out.
        distribution_steps: steps of PD-Quant's correction of the teacher's activations towards batch norm's statistics,
            for every unit before its own steps; its code takes 500. 0 leaves them as they are.

    Raises:
        PTQError: an unknown option or a probability outside [0, 1).
    """

    granularity: Granularity = "block"
    input: UnitInput = "quant"
    rounding: Rounding = "nearest"
    scales: ScaleLearning = "none"
    drop: float = 0.0
    drop_until: float = 1.0
    weighting: Weighting = "equal"
    corrections: bool = False
    prediction: float = 0.0
    distribution_steps: int = 0

    def __post_init__(self) -> None:
        check_option(self.granularity, get_args(Granularity), "granularity")
        check_option(self.input, get_args(UnitInput), "input")
        check_option(self.rounding, get_args(Rounding), "rounding")
        check_option(self.scales, get_args(ScaleLearning), "scales")
        check_option(self.weighting, get_args(Weighting), "weighting")
        if not 0.0 <= self.drop < 1.0:
            raise PTQError(f"drop={self.drop} is no probability below 1. Use 0.5 as QDrop does, or 0 to switch it off.")
        if not 0.0 <= self.drop_until <= 1.0:
            raise PTQError(f"drop_until={self.drop_until} is no share. Use 1 to drop in all steps of a unit.")
        if not self.prediction >= 0.0:
            raise PTQError(f"prediction={self.prediction} must not be negative. Use 0 to leave the term out.")
        steps = self.distribution_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise PTQError(f"distribution_steps={steps} must be a whole number, 0 or more. Use 0 to leave them out.")
        if steps and self.input != "mix":
            raise PTQError(
                f"distribution_steps={steps} corrects what is mixed into a unit's input, and input={self.input!r} "
                "mixes nothing. Use method='pdquant' or input='mix', or leave it out."
            )
        if self.input == "mix" and self.drop == 0.0:
            raise PTQError("input='mix' with drop=0 mixes nothing. Set drop=0.5, or use input='quant'.")

    @property
    def learns(self) -> bool:
        """Whether there is anything to optimise in a unit."""
        return self.rounding != "nearest" or self.scales != "none"

    @property
    def corrects_biases(self) -> bool:
        """Whether shifts of biases are worked out instead of learned."""
        return self.corrections and not self.learns

    def learns_network(self, round_again: bool) -> bool:
        """Whether there is anything to optimise in the whole network, behind its units.

        Args:
            round_again: if the rounding can be learned, it is learned there too.
        """
        return self.learns and (self.scales != "none" or self.corrections or round_again)

    def rate_factors(self, progress: float) -> tuple[float, float]:
        """Multipliers of the (rounding, scale) learning rates at `progress` in [0, 1) of a unit's steps."""
        # AdaRound's regulariser ends the search; what is straight through would go on jumping.
        rounding = cosine(self.rounding_progress(progress)) if self.rounding == "flexround" else 1.0
        if self.scales == "none":
            return rounding, 0.0
        if self.scales == "joint":
            return rounding, cosine(progress)
        if progress < _AFTER:
            return rounding, 0.0
        return 0.0, cosine((progress - _AFTER) / (1.0 - _AFTER))

    def rounding_progress(self, progress: float) -> float:
        """How far the annealing of the rounding has come, in [0, 1]."""
        return min(progress / _AFTER, 1.0) if self.scales == "after" else progress


# As the papers have them, except for corrections and drop_until.
_QDROP = Method(
    input="mix", rounding="adaround", scales="joint", drop=0.5, drop_until=0.8, weighting="fisher", corrections=True
)
METHODS: dict[str, Method] = {
    "nearest": Method(),
    "adaround": Method(granularity="layer", rounding="adaround", corrections=True),
    "brecq": Method(rounding="adaround", scales="after", weighting="fisher", corrections=True),
    "qdrop": _QDROP,
    "pdquant": replace(_QDROP, prediction=0.1),
    "flexround": replace(_QDROP, rounding="flexround"),
}


def get_method(
    name: str,
    *,
    granularity: Granularity | None = None,
    input: UnitInput | None = None,
    rounding: Rounding | None = None,
    scales: ScaleLearning | None = None,
    drop: float | None = None,
    drop_until: float | None = None,
    weighting: Weighting | None = None,
    corrections: bool | None = None,
    prediction: float | None = None,
    distribution_steps: int | None = None,
) -> Method:
    """The preset called `name`, with the coordinates that are given replaced.

    Raises:
        PTQError: unknown preset or coordinate.
    """
    check_option(name, tuple(METHODS), "method")
    given: dict[str, object] = {
        "granularity": granularity,
        "input": input,
        "rounding": rounding,
        "scales": scales,
        "drop": drop,
        "drop_until": drop_until,
        "weighting": weighting,
        "corrections": corrections,
        "prediction": prediction,
        "distribution_steps": distribution_steps,
    }
    return replace(METHODS[name], **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]


def default_rates(steps: int) -> tuple[float, float]:
    """Learning rates of (rounding, scales) for a budget of `steps` per unit.

    Adam moves a parameter by about its rate at every step, so what can be reached in fewer steps needs higher rates,
    almost in inverse proportion. The exponent fits what did best on held-out calibration images at 500 steps.
    """
    factor = (_REFERENCE_STEPS / steps) ** 0.8
    return _REFERENCE_ROUNDING_LR * factor, _REFERENCE_SCALE_LR * factor


def default_network_steps(steps: int) -> int:
    """Steps of the whole network's epoch where units take `steps`: each goes through all of them.

    As many, up to a hundred; then ten times the square root, but an eighth at least. On unseen calibration images 100
    and 100 are as good as 250 and 32, in two thirds of the time (docs/performance.md).
    """
    return max(-(-steps // 8), min(steps, round(10 * math.sqrt(steps))))


def cosine(progress: float) -> float:
    """From 1 at `progress` 0 to 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
