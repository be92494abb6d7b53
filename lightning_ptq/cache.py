"""Activation caches: what unit k reads and should give, for every calibration image, advanced unit by unit.

Each unit is run once over the images for each advance; the units before it are never run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ptq.distribution import correct_distribution
from lightning_ptq.errors import PTQError
from lightning_ptq.graph.units import Chain
from lightning_ptq.losses.critic import pooled
from lightning_ptq.seeds import mixed_seed

# Images per forward pass where no gradient is needed, and numbers of them: large ones pass a few at a time.
CHUNK, _CHUNK_SIZE = 64, 2**24
# Images that judge where none are held out.
JUDGE_IMAGES = 256


def run_chunked(function: Callable[[Tensor], Tensor], x: Tensor, device: torch.device) -> Tensor:
    """`function` over all images of `x` (N, ...), some at a time on `device`; the result lies where `x` lies.

    Its memory is laid out as that of the parts. Runs under `no_grad`, not `inference_mode`: calibration takes gradients
    through operations on the result.
    """
    result: Tensor | None = None
    with torch.no_grad():
        start = 0
        for some in chunks(x):
            part = function(some.to(device, non_blocking=True))
            if result is None:
                layout = torch.channels_last if is_channels_last(part) else torch.contiguous_format
                shape = (len(x), *part.shape[1:])
                result = torch.empty(shape, dtype=part.dtype, device=x.device, memory_format=layout)
            result[start : start + len(part)] = part
            start += len(part)
    assert result is not None
    return result


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` lies in memory with its channels last, and not as usual."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B,) of `x` (N, ...), laid out as `x` is."""
    if is_channels_last(x):  # index_select alone would copy each row element by element
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return x.index_select(0, index)


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
        images: this process's calibration images (N, C, H, W).
        device: where units run.
        on_device: keep the caches there too, else in host memory.
        held_out: so many of the images, the last ones, are never drawn for a step; they judge what was learned.
        correction: steps of `correct_distribution`, 0 for none; what judges and what the next unit starts from is not
            corrected.
    """

    def __init__(
        self,
        teacher: Chain,
        student: Chain,
        images: Tensor,
        device: torch.device,
        on_device: bool,
        held_out: int = 0,
        correction: int = 0,
    ) -> None:
        self.teacher, self.student, self.device = teacher, student, device
        self.drawn, self.correction = len(images) - held_out, correction
        self.unit = 0
        self.teacher_in = images.to(device) if on_device else images
        self.student_in = self.teacher_in
        # The tail of the teacher's own activations is the teacher's output, whatever the unit: computed once.
        # A part's are features of many positions and nothing is predicted from them: their means tell images apart.
        final = (lambda x: pooled(teacher(x))) if teacher.is_part else teacher
        self.features = self._run(final, self.teacher_in, "the whole network")
        self.teacher_out = self._run(teacher.units[0], self.teacher_in, teacher.names[0])
        self._corrected: tuple[Tensor, Tensor] | None = None

    @property
    def judged(self) -> slice:
        """Rows that judge: those held out, or else some that are drawn."""
        return judged_rows(self.drawn, len(self.teacher_in))

    def minibatch(self, index: Tensor, corrected: bool = False) -> Minibatch:
        """Rows `index` (B,) of the caches, all below `drawn`; of the teacher's side as corrected, if it is."""
        index = index.to(self.teacher_in.device)
        teacher = self._correction() if corrected and self.correction else (self.teacher_in, self.teacher_out)
        parts = (take(t, index) for t in (self.student_in, *teacher, self.features))
        return Minibatch(*(part.to(self.device, non_blocking=True) for part in (*parts, index)))

    def student_out(self, rows: slice = slice(None)) -> Tensor:
        """The student unit's output for these rows, as quantized now; finite or not."""
        return run_chunked(self.student.units[self.unit], self.student_in[rows], self.device)

    def advance(self, student_out: Tensor) -> None:
        """Go to the next unit, whose student input is `student_out`."""
        check_finite(student_out, self.student.names[self.unit])
        self.unit += 1
        # The old input goes before the new output comes: without correction never more than three activations are held.
        self._corrected = None
        self.teacher_in, self.student_in = self.teacher_out, student_out
        self.teacher_out = self._run(self.teacher.units[self.unit], self.teacher_in, self.teacher.names[self.unit])

    def _correction(self) -> tuple[Tensor, Tensor]:
        """The corrected input and output of the teacher's unit, of images that are drawn; worked out when needed."""
        if self._corrected is None:
            unit, name = self.teacher.units[self.unit], self.teacher.names[self.unit]
            moved = correct_distribution(unit, self.teacher_in[: self.drawn], self.device, self.correction)
            self._corrected = moved, self._run(unit, moved, name)
        return self._corrected

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
        out = run_chunked(function, x, self.device)
        check_finite(out, name)
        return out


def judged_rows(drawn: int, total: int) -> slice:
    """Which of `total` rows judge what was learned on the first `drawn`: the others, or some of these if all are."""
    return slice(drawn, total) if drawn < total else slice(JUDGE_IMAGES)


def check_finite(out: Tensor, name: str) -> None:
    """Raise `PTQError` naming the unit if its output holds NaN or infinity."""
    # Largest magnitude, not the sum: finite values can have an infinite sum.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(out.detach()))).all()):
        raise PTQError(
            f"unit {name!r} gives NaN or infinite activations. Check the calibration images and the model's weights; "
            "a layer that overflows can be kept out with `leaf_modules`."
        )


def fits_on_device(teacher: Chain, images: Tensor, device: torch.device, corrected: bool = False) -> bool:
    """Whether the largest caches that calibration will hold take at most half of the device's free memory."""
    if device.type != "cuda":
        return True  # host memory either way
    sizes = [images[0].numel()]
    with torch.no_grad():
        x = images[:1].to(device)
        for unit in teacher.units:
            x = unit(x)
            sizes.append(x.numel())
    # Teacher and student input and teacher output of one unit, and the output that becomes the next input.
    # Corrected ones are one input and one output more.
    largest = max((2 + corrected) * (a + b) for a, b in pairwise(sizes))
    free, _ = torch.cuda.mem_get_info(device)
    return largest * len(images) * 4 <= free // 2


def sample_index(total: int, size: int, step: int, *seed: int) -> Tensor:
    """The rows of step `step`, (size,): slices of one permutation after another, so every image comes equally often.

    No row comes twice in a batch: a repeated image would be a false negative. A pure function of its arguments.
    """
    per_pass = total // size
    generator = torch.Generator().manual_seed(mixed_seed(*seed, step // per_pass))
    start = step % per_pass * size
    return torch.randperm(total, generator=generator)[start : start + size]


def chunks(x: Tensor, size: int = CHUNK) -> Iterator[Tensor]:
    """Slices of at most `size` rows, of fewer where a row is large."""
    size = max(1, min(size, _CHUNK_SIZE // max(x[0].numel(), 1))) if len(x) else size
    for start in range(0, len(x), size):
        yield x[start : start + size]
