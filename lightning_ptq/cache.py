"""Activation caches: what unit k reads and should give, for every calibration image, advanced unit by unit.

Each unit is run once over the images for each advance; the units before it are never run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ptq.distribution import correct_distribution
from lightning_ptq.errors import PTQError
from lightning_ptq.graph.units import Chain
from lightning_ptq.losses.critic import pooled
from lightning_ptq.seeds import mixed_seed
from lightning_ptq.store import Store, chunks, run_chunked, sent, take

# Images that judge where none are held out.
JUDGE_IMAGES = 256


# Numbers of the same rows in host memory and on the compute device, each (B,).
Rows = tuple[Tensor, Tensor]


class Minibatch(NamedTuple):
    """What one step reads: the same rows of every cache and their numbers; all (B, ...), on the compute device."""

    student_in: Tensor
    teacher_in: Tensor
    teacher_out: Tensor
    features: Tensor
    rows: Tensor


class UnitCache:
    """Caches of the unit that is being calibrated.

    Args:
        teacher, student: the two chains.
        images: this process's calibration images (N, C, H, W), which lie in the store.
        store: where caches are kept, and for which device.
        held_out: so many of the images, the last ones, are never drawn for a step; they judge what was learned.
        correction: steps of `correct_distribution`, 0 for none; what judges and what the next unit starts from is not
            corrected.
    """

    def __init__(
        self,
        teacher: Chain,
        student: Chain,
        images: Tensor,
        store: Store,
        held_out: int = 0,
        correction: int = 0,
    ) -> None:
        self.teacher, self.student, self.store = teacher, student, store
        self.device = store.device
        self.drawn, self.correction = len(images) - held_out, correction
        self.unit = 0
        self.teacher_in = self.student_in = images
        # The tail of the teacher's own activations is the teacher's output, whatever the unit: computed once.
        # A part's are features of many positions and nothing is predicted from them: their means tell images apart.
        final = (lambda x: pooled(teacher(x))) if teacher.is_part else teacher
        self.features = run_chunked(final, images, self.device, store)
        check_finite(self.features, "the whole network")
        self.teacher_out = self._run(images)
        self._corrected: tuple[Tensor, Tensor] | None = None

    @property
    def judged(self) -> slice:
        """Rows that judge: those held out, or else some that are drawn."""
        return judged_rows(self.drawn, len(self.teacher_in))

    def minibatch(self, rows: Rows, corrected: bool = False, into: Minibatch | None = None) -> Minibatch:
        """These rows of the caches, all below `drawn`; of the teacher's side as corrected, if it is.

        Args:
            rows: (B,) in host memory and on the device.
            into: an earlier minibatch of the unit, whose memory is written to.
        """
        teacher = self._correction() if corrected and self.correction else (self.teacher_in, self.teacher_out)
        return Minibatch(*gathered((self.student_in, *teacher, self.features), rows, self.device, into))

    def student_out(self, rows: slice = slice(None)) -> Tensor:
        """The student unit's output for these rows, as quantized now; finite or not."""
        return self._run(self.student_in[rows], self.student)

    def advance(self, student_out: Tensor) -> None:
        """Go to the next unit, whose student input is `student_out`."""
        check_finite(student_out, self.student.names[self.unit])
        self.unit += 1
        # The old input goes before the new output comes: without correction never more than three activations are held.
        self._corrected = None
        self.teacher_in, self.student_in = self.teacher_out, student_out
        self.teacher_out = self._run(self.teacher_in)

    def _correction(self) -> tuple[Tensor, Tensor]:
        """The corrected input and output of the teacher's unit, of images that are drawn; worked out when needed."""
        if self._corrected is None:
            unit, x = self.teacher.units[self.unit], self.teacher_in[: self.drawn]
            moved = correct_distribution(unit, x, self.device, self.correction, self.store.like)
            self._corrected = moved, self._run(moved)
        return self._corrected

    def _run(self, x: Tensor, chain: Chain | None = None) -> Tensor:
        """What the present unit makes of `x`, that of the teacher if no other chain is given; the last one's exactly.

        The teacher's has to be finite.
        """
        chain, last = chain or self.teacher, self.unit == len(self.teacher) - 1
        out = run_chunked(chain.units[self.unit], x, self.device, self.store, exact=last)
        if chain is self.teacher:
            check_finite(out, chain.names[self.unit])
        return out


def gathered(
    tensors: Sequence[Tensor], rows: Rows, device: torch.device, into: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """These rows of each of the tensors, and their numbers, all on `device`.

    Args:
        rows: (B,) in host memory and on the device.
        into: what an earlier call gave, whose memory is written to.
    """
    here, there = rows
    places: Sequence[Tensor | None] = [None] * len(tensors) if into is None else into
    found = [
        take(x, there if x.device.type == device.type else here, device, place)
        for x, place in zip(tensors, places, strict=False)
    ]
    # The numbers too in memory of their own: that of an order lives as long as its pass.
    return [*found, there.clone() if into is None else into[-1].copy_(there)]


def judged_rows(drawn: int, total: int) -> slice:
    """Which of `total` rows judge what was learned on the first `drawn`: the others, or some of these if all are."""
    return slice(drawn, total) if drawn < total else slice(JUDGE_IMAGES)


def check_finite(out: Tensor, name: str) -> None:
    """Raise `PTQError` naming the unit if its output holds NaN or infinity."""
    # Largest magnitude, not the sum: finite values can have an infinite sum.
    if not all(bool(torch.isfinite(torch.stack(torch.aminmax(x.detach()))).all()) for x in chunks(out)):
        raise PTQError(
            f"unit {name!r} gives NaN or infinite activations. Check the calibration images and the model's weights; "
            "a layer that overflows can be kept out with `leaf_modules`."
        )


class Order:
    """Which rows each step reads: slices of one permutation after another, so every image comes equally often.

    No row comes twice in a batch: a repeated image would be a false negative. A pure function of the arguments.

    Args:
        total: number of rows. size: of them for each step.
        seed: of the permutations.
        device: where steps are taken.
    """

    def __init__(self, total: int, size: int, *seed: int, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self.total, self.size, self.seed, self.device = total, size, seed, device
        self._pass = -1
        self._here = self._there = torch.empty(0, dtype=torch.long)

    def rows(self, step: int) -> Rows:
        """The rows of `step`, (size,), in host memory and on the device, to which they go once for each pass."""
        number, place = divmod(step, self.total // self.size)
        if number != self._pass:
            generator = torch.Generator().manual_seed(mixed_seed(*self.seed, number))
            self._here = torch.randperm(self.total, generator=generator)
            self._there, self._pass = sent(self._here, self.device), number
        chosen = slice(place * self.size, (place + 1) * self.size)
        return self._here[chosen], self._there[chosen]
