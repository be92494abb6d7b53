"""Does the exported model do what the simulation did? Both run on the same images; if they differ, by which unit?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ptq.graph.pack import pack_of
from lightning_ptq.graph.units import Chain
from lightning_ptq.metrics import classes, decibels, has_scores, signal_and_noise
from lightning_ptq.store import chunks

# What runs an exported network: images (N, C, H, W) -> its outputs.
Run = Callable[[Tensor], Sequence[Tensor]]
# What an export has to reach: percent of images with the same class, where there are classes; signal to difference, dB.
LEAST = (99.9, 40.0)
# Enough if the file, run without the runtime's optimisations, reaches the former: its faster kernels round what lies in
# the middle between two integers the other way, and what is one step off in one layer is more of it in the next.
LEAST_OPTIMISED = (98.5, 30.0)
# Where the simulation itself, computed in double precision, does not reach it either, an export may be so much worse.
_MARGIN = (0.5, 3.0)


@dataclass(frozen=True)
class ParityReport:
    """How an exported model compares with the simulated student.

    Attributes:
        path: the exported file. size: its bytes. images: how many were compared.
        agreement: percent of images (or pixels) with the same class; None without classes.
        sqnr_db: signal to difference of the output.
        largest_difference: of any number of the output.
        plain_sqnr_db: SQNR without the runtime's optimisations; None if there was no need to look.
        own_sqnr_db: that of the simulation computed in double precision; None if there was no need to look.
        unit: where the first unit that differs by more than it may was looked for, its name; None elsewhere.
        kernels: of a lowered program, how many layers are in int8 kernels, and how many there are.
    """

    path: str
    size: int
    images: int
    agreement: float | None
    sqnr_db: float
    largest_difference: float
    passed: bool
    plain_sqnr_db: float | None = None
    own_sqnr_db: float | None = None
    unit: str | None = None
    kernels: tuple[int, int] | None = None

    def text(self) -> str:
        """One line, and what is wrong if it did not pass."""
        told = "" if self.agreement is None else f"{self.agreement:.2f} % of classes agree, "
        what = f"{self.path}: {self.size:,} bytes"
        if self.kernels is not None:
            what = f"{self.path} in int8 kernels: {self.kernels[0]} of {self.kernels[1]} layers"
        line = f"{what}; {self.images} images: {told}SQNR {self.sqnr_db:.1f} dB"
        if self.plain_sqnr_db is not None:
            line += f", {self.plain_sqnr_db:.1f} dB without the runtime's optimisations"
        if self.own_sqnr_db is not None:
            line += f"; the simulation computed in double precision: {self.own_sqnr_db:.1f} dB"
        if self.passed:
            return f"{line}: as simulated{'' if self.own_sqnr_db is None else ', but for ties'}"
        asked = f"{LEAST[1]:g} dB" + ("" if self.agreement is None else f" and {LEAST[0]:g} % of classes")
        return f"{line}: NOT as simulated, for which {asked} are asked. The first unit that differs is {self.unit!r}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


def one_output(student: Chain, outputs: Sequence[Tensor]) -> Tensor:
    """What an exported network gives, as the one tensor that the student gives."""
    pack = pack_of(student)
    return outputs[0] if pack is None else pack(*outputs)


@dataclass(frozen=True)
class Likeness:
    """How alike two networks' outputs are.

    Attributes:
        same: how many images (or pixels) have the same class, of `count`; count is 0 where there are no classes.
        sqnr_db: signal to difference. largest_difference: of any number.
    """

    same: int
    count: int
    sqnr_db: float
    largest_difference: float

    @property
    def agreement(self) -> float | None:
        """Percent with the same class; None without classes."""
        return 100.0 * self.same / self.count if self.count else None

    def reaches(self, agreement: float, sqnr_db: float) -> bool:
        """Whether this may be called the same model: so much percent agree and so many decibels are between them.

        One image of a thousand may differ, and one where there are fewer: two scores may tie.
        """
        # Rounded first: a percentage of a count is off by some last bits.
        enough = min(math.ceil(round(agreement / 100 * self.count, 6)), self.count - 1)
        return self.sqnr_db >= sqnr_db and self.same >= enough


@torch.no_grad()
def compare_outputs(student: Chain, run: Run, images: Tensor) -> Likeness:
    """How alike the outputs of `run` and the student are on `images`."""
    device = next(student.parameters()).device
    same = count = 0
    sums, largest = torch.zeros(2, dtype=torch.float64), 0.0
    for x in chunks(images):
        expected, actual = student(x.to(device)).float().cpu(), one_output(student, run(x))
        sums += signal_and_noise(actual, expected)
        largest = max(largest, float((actual - expected).abs().max()))
        if has_scores(expected) and not student.is_part:
            agree = classes(actual) == classes(expected)
            same, count = same + int(agree.sum()), count + agree.numel()
    return Likeness(same, count, decibels(*sums.tolist()), largest)


def in_double(student: Chain) -> Run:
    """What computes the same in double precision: it differs where the last bits of a sum decide what is rounded up."""
    double = deepcopy(student).double()

    @torch.no_grad()
    def run(images: Tensor) -> Sequence[Tensor]:
        return (double(images.to(next(double.parameters()).device).double()).float().cpu(),)  # packed, if several

    return run


def as_rounding_allows(own: Likeness) -> tuple[float, float]:
    """What an export has to reach where the simulation in double precision is so like itself, but no less than what its
    optimised form has to."""
    agreement = min(LEAST[0], LEAST[0] if own.agreement is None else own.agreement - _MARGIN[0])
    sqnr_db = min(LEAST[1], own.sqnr_db - _MARGIN[1])
    return max(agreement, LEAST_OPTIMISED[0]), max(sqnr_db, LEAST_OPTIMISED[1])


@torch.no_grad()
def first_difference(student: Chain, outputs: Sequence[Tensor], images: Tensor) -> str:
    """The first unit whose output differs from the student's by more than it may.

    Args:
        outputs: what the exported units give for `images`, one after another; the last one may give several.
    """
    inner = len(student) - 1
    outputs = [*outputs[:inner], one_output(student, outputs[inner:])]
    x, device = images, next(student.parameters()).device
    worst, least = student.names[-1], float("inf")
    for name, unit, actual in zip(student.names, student.units, outputs, strict=True):
        x = unit(x.to(device))
        sqnr = decibels(*signal_and_noise(actual, x.float().cpu()).tolist())
        if sqnr < LEAST[1]:
            return name
        if sqnr < least:
            worst, least = name, sqnr
    return worst
