"""What a loss term sees and how terms are weighted and summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_ptq.functional import binade, in_float32
from lightning_ptq.losses.gather import processes

# Steps at the start of a unit over which the weight of a balanced term is measured; then it is frozen.
BALANCE_STEPS = 8


class TeacherSide(Protocol):
    """What the teacher makes of all calibration images of this process, in a unit: its output, and the final one."""

    teacher_out: Tensor
    features: Tensor


@dataclass(frozen=True)
class Tail:
    """The units behind the one under calibration.

    Attributes:
        run: (x, n) -> what the first n of them make of x, n > 0.
        length: how many there are.
        channel_dim: (n, shape of their output) -> its dimension of channels.
    """

    run: Callable[[Tensor, int], Tensor]
    length: int
    channel_dim: Callable[[int, Sequence[int]], int] = lambda units, shape: 1

    def __call__(self, x: Tensor, units: int | None = None) -> Tensor:
        """`x` behind the first `units` of the tail; None runs all."""
        units = self.length if units is None else units
        return self.run(x, units) if units else x


@dataclass
class UnitBatch:
    """One minibatch of one unit, B images.

    In the epoch of the whole network the unit's output is the input of the head, and the tail is the student's head.

    Attributes:
        student_out, teacher_out: the unit's outputs, same shape (B, ...).
        channel_dim: which dimension of the output is that of channels.
        importance: weight of every channel of the output (C,), or None where all count alike.
        inner: (student, teacher) values where each layer but the last ends, if calibration is layer-wise inside the
            unit; student gradients do not cross from one layer to another.
        teacher_features: the teacher's final output (B, ...).
        teacher_side: the teacher's tensors of all images, the same object in every step of a unit.
        rows: of this minibatch among all images (B,).
        changed: whether the images were changed at random, so that the teacher's tensors of all images hold others.
        generator: of what is drawn at random in this step, on the outputs' device; None: torch's own.
        clean: gives the unit's output as it will be, without drop and mixed input: one more forward pass.
        tail: the frozen rest of the teacher, from a unit's output to the final output.
        student_unit: the unit under calibration.
        roundings: of every weight tensor whose rounding is learned, how far each weight is rounded up, in [0, 1].
        unit: its index in the objective. step: the optimisation step within it.
        progress: share of the unit's rounding schedule that is done, in [0, 1].
        beta: exponent of AdaRound's regulariser then, or a tensor () that holds it; None while that is off.
    """

    student_out: Tensor
    teacher_out: Tensor
    teacher_features: Tensor
    teacher_side: TeacherSide
    rows: Tensor
    tail: Tail
    student_unit: nn.Module
    unit: int
    step: int
    progress: float
    roundings: Sequence[Tensor] = ()
    channel_dim: int = 1
    importance: Tensor | None = None
    inner: Sequence[tuple[Tensor, Tensor]] = ()
    changed: bool = False
    generator: torch.Generator | None = None
    beta: float | Tensor | None = None
    clean: Callable[[], Tensor] | None = None

    @cached_property
    def clean_out(self) -> Tensor:
        """The unit's output (B, ...) without drop and mixed input."""
        return self.student_out if self.clean is None else self.clean()


def channels_first(x: Tensor, dim: int) -> Tensor:
    """A view (B, C, ...) of `x`, whose channels are at `dim`."""
    return x if dim == 1 else x.movedim(dim, 1)


class Term(nn.Module):
    """A loss term: maps a `UnitBatch` to a scalar.

    `rho` is None for a term that is added as it is. Otherwise the term is balanced: its gradient at the unit's output
    is scaled to `rho` times the norm of the first term's. A dear term can be computed at each `every`-th step only;
    it then counts `every` times as much.

    A term is `recordable` if what it computes depends on the batch's tensors alone, `beta` and `generator` among them,
    and never waits for the GPU: its steps may then be recorded and played back (`replay.py`). It may still branch on
    what stays for a whole unit, and on whether `beta` is None.
    """

    rho: float | None = None
    every: int = 1
    recordable: bool = False

    def forward(self, batch: UnitBatch) -> Tensor:
        raise NotImplementedError

    def output(self, batch: UnitBatch) -> Tensor:
        """The unit's output that `forward` reads, where a balanced term's gradient is measured."""
        return batch.student_out

    def forget(self) -> None:
        """Drop what was kept for a unit: no unit is calibrated any more."""


class Objective(nn.Module):
    """Weighted sum of terms, the first of which is what balanced terms are measured against: reconstruction, as a rule.

    Args:
        terms: name -> term.
        units: number of units; each has its own weights.
    """

    ratio_sums: Tensor

    def __init__(self, terms: dict[str, Term], units: int) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.register_buffer("ratio_sums", torch.zeros(units, len(terms)))

    def forward(self, batch: UnitBatch) -> dict[str, Tensor]:
        """The weighted terms by name; their sum is the loss."""
        result: dict[str, Tensor] = {}
        reference: Tensor | None = None
        with in_float32(batch.student_out.device):
            for i, (name, term) in enumerate(zip(self.terms, self._each, strict=True)):
                if batch.step % term.every:
                    result[name] = batch.student_out.new_zeros(())
                    continue
                value = term(batch)
                if reference is None:
                    reference = value
                elif term.rho is not None:
                    value = value * self._weight(i, term, value, reference, batch)
                result[name] = value * term.every if term.every > 1 else value
        return result

    @property
    def is_recordable(self) -> bool:
        """Whether all terms are."""
        return all(term.recordable for term in self._each)

    def is_steady(self, step: int) -> bool:
        """Whether no weight of a term is measured at this step any more."""
        return all(term.rho is None or step // term.every >= BALANCE_STEPS for term in self._each)

    def present(self, step: int) -> tuple[bool, ...]:
        """Which terms are computed at this step."""
        return tuple(step % term.every == 0 for term in self._each)

    @property
    def _each(self) -> Iterable[Term]:
        return self.terms.values()  # type: ignore[return-value]

    def forget(self) -> None:
        """Drop what terms keep for a unit."""
        for term in self._each:
            term.forget()

    def _weight(self, i: int, term: Term, value: Tensor, reference: Tensor, batch: UnitBatch) -> Tensor:
        """lambda = rho * mean over the first steps of |d reference / d output| / |d value / d output|."""
        assert term.rho is not None
        if not reference.requires_grad:  # a unit without anything to learn: there are no gradients to compare
            return torch.zeros_like(value)
        step = batch.step // term.every
        if step < BALANCE_STEPS:
            ratio = _gradient_norm(reference, batch.student_out) / _gradient_norm(value, term.output(batch))
            ratio = torch.nan_to_num(ratio, nan=0.0, posinf=0.0)
            if processes() > 1:
                torch.distributed.all_reduce(ratio)
                ratio = ratio / processes()
            # Step 0 overwrites, so that entering a unit again starts its measurement again.
            self.ratio_sums[batch.unit, i] *= float(step > 0)
            self.ratio_sums[batch.unit, i] += ratio
        return term.rho * self.ratio_sums[batch.unit, i].clone() / min(step + 1, BALANCE_STEPS)


def _gradient_norm(value: Tensor, at: Tensor) -> Tensor:
    # Half precision would lose the small gradients of a mean over many elements.
    factor = 2.0**16 if at.dtype == torch.float16 else 1.0
    (gradient,) = torch.autograd.grad(value * factor, at, retain_graph=True)
    gradient = gradient.float()
    unit = binade(gradient.abs().max())
    # In float64: float32 loses percents of a sum of so many squares.
    norm: Tensor = torch.linalg.vector_norm(gradient / unit, dtype=torch.float64).float() * (unit / factor)
    return norm
