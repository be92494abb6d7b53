"""The last epoch: the whole network as one more unit.

Unit by unit, each error is judged where it arises. What remains is judged at the output: activation scales and, for
every channel of every layer, a gain on the quantized weights and a shift of the bias are trained together, from where
the units left them, and so is the weights' rounding if asked for. None of it costs anything at inference, since gains
go into the weights' scales and shifts into the biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.cache import Minibatch, Rows, UnitCache, gathered, judged_rows
from lightning_ptq.calibration import Comparison, UnitReport, is_chance, no_worse, report, restore_initial
from lightning_ptq.graph.units import Chain
from lightning_ptq.losses.prediction import prediction_errors
from lightning_ptq.losses.reconstruction import squared_errors
from lightning_ptq.quantizers import act_quantizers, initial_ranges, weight_quantizers
from lightning_ptq.store import Store, chunks, run_chunked

# What this epoch is called where the others bear their unit's name.
NETWORK = "whole-network"

# The epoch is undone if the divergence on images that are drawn grew by more than this factor. Not by any growth: the
# units have fitted these very images, and the epoch takes some of that back.
HARM = 1.25
# And if that of images that are held out, which are few, grew by more than chance has it.

Mean = Callable[[Tensor], Tensor]
Errors = Callable[[Tensor, Tensor], Tensor]
# Divergences of images that are recognised well are next to nothing, and may grow by half of that.
_USUAL_GROWTH = 1.5


class NetworkCache:
    """What the whole network reads and should give: images, and the teacher's input and output of the head.

    The head is the last unit.

    Args:
        student: a chain of two units at least.
        images: this process's calibration images (N, C, H, W). teacher_out, features: what the teacher makes of them.
        store: where all of these lie, and for which device.
        drawn: so many of the images, the first ones, are drawn for steps; the others judge.
        rounding: the epoch trains the weights' rounding too.
    """

    def __init__(
        self,
        student: Chain,
        images: Tensor,
        teacher_out: Tensor,
        features: Tensor,
        store: Store,
        drawn: int,
        rounding: bool = False,
    ) -> None:
        self.student, self.store, self.drawn = student, store, drawn
        self.device = store.device
        self.learned = [q.log_scale for q in act_quantizers(student)]
        for q in weight_quantizers(student):
            self.learned += [*q.corrections, *(q.roundings if rounding else ())]
        self.images, self.teacher_out, self.features = images, teacher_out, features

    @property
    def judged(self) -> slice:
        """Rows that judge: those held out, or else some that are drawn."""
        return judged_rows(self.drawn, len(self.images))

    def minibatch(self, rows: Rows, corrected: bool = False, into: Minibatch | None = None) -> Minibatch:
        """These rows of the caches; the unit's output is the input of the head. Arguments as in `UnitCache`."""
        tensors = (self.images, self.teacher_out, self.features)
        images, *rest = gathered(tensors, rows, self.device, into and [into.student_in, *into[2:]])
        return Minibatch(images, images, *rest)

    def student_out(self) -> Tensor:
        """The student's final output for all images, as quantized now; finite or not."""
        return run_chunked(self.student, self.images, self.device, self.store)


@dataclass(frozen=True)
class NetworkStart:
    """Where the last epoch began, for the judgement at its end: what a checkpoint in its middle must hold.

    Attributes:
        learned: copies of what the epoch may train, `NetworkCache.learned`, in host memory.
        prediction: `prediction_loss` of the student on the images that are drawn.
        mse: `reconstruction_loss` of its output, on those that are held out, if any are.
        squares: the same on the images that are drawn; an older checkpoint does not have it.
    """

    learned: list[Tensor]
    prediction: float
    mse: float
    squares: float = math.inf

    @classmethod
    def of(cls, cache: NetworkCache, out: Tensor, mean: Mean) -> NetworkStart:
        """The student as it stands, whose output for the cache's images is `out`."""
        learned = [parameter.detach().cpu().clone() for parameter in cache.learned]
        return cls(learned, *_errors(cache, out, mean))

    def restore(self, cache: NetworkCache) -> None:
        """Put the cache's student back."""
        for parameter, saved in zip(cache.learned, self.learned, strict=True):
            parameter.data.copy_(saved)

    @contextmanager
    def restored(self, cache: NetworkCache) -> Iterator[None]:
        """Inside, the cache's student is as it was."""
        now = replace(self, learned=[parameter.detach().clone() for parameter in cache.learned])
        self.restore(cache)
        try:
            yield
        finally:
            now.restore(cache)

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors only; not copies of them."""
        return dict(vars(self))


def finish_network(
    cache: NetworkCache, start: NetworkStart, mean: Mean, processes: int = 1
) -> tuple[UnitReport, Tensor]:
    """Judge the last epoch by the network's predictions, undo it where it did harm, and say what happened.

    Args:
        processes: how many of them `mean` averages over.

    Returns:
        (report, the network's final output for all cached images).
    """
    out = cache.student_out()
    after, mse, squares = _errors(cache, out, mean)
    # Not `after > limit`: a NaN must be rejected too. By squares as well: outputs that are no scores of classes may
    # drift together, which no prediction shows, while scores come closer in both.
    accepted = after <= start.prediction * HARM and squares <= start.squares * HARM and math.isfinite(mse)
    if cache.drawn < len(cache.images):
        accepted = accepted and _within_chance(cache, start, out, mean, processes)
    if not accepted:
        start.restore(cache)
        out, mse = cache.student_out(), start.mse
    rows = cache.judged
    errors = (start.mse, mse)
    found = Comparison(cache.device).over(out[rows], cache.features[rows])
    return report(NETWORK, cache.student, found, errors, accepted, mean), out


def _within_chance(cache: NetworkCache, start: NetworkStart, out: Tensor, mean: Mean, processes: int) -> bool:
    """Whether the divergence of the images that are held out grew by no more than it may by chance."""
    rows = cache.judged
    with start.restored(cache):
        before = run_chunked(cache.student, cache.images[rows], cache.device, cache.store)
    now, then = (_each(prediction_errors, x, cache.features[rows], cache.device) for x in (out[rows], before))
    growth = now - then
    average, square = mean(torch.stack([growth.mean(), growth.square().mean()])).double()
    return bool(is_chance(average, square, len(growth) * processes))  # all hold out equally many


def _errors(cache: NetworkCache, out: Tensor, mean: Mean) -> tuple[float, float, float]:
    # Of all that are drawn, not of some: each has its say about the network.
    drawn = slice(cache.drawn)
    told = drawn if cache.drawn == len(cache.images) else cache.judged
    kinds: tuple[tuple[Errors, slice], ...] = (
        (prediction_errors, drawn),
        (squared_errors, told),
        (squared_errors, drawn),
    )
    parts = [_each(errors, out[rows], cache.features[rows], cache.device).mean() for errors, rows in kinds]
    prediction, mse, squares = mean(torch.stack(parts)).tolist()
    return prediction, mse, squares


def _each(errors: Errors, out: Tensor, target: Tensor, device: torch.device) -> Tensor:
    """The errors of all images (N,), a few at a time on `device`."""
    pairs = zip(chunks(out), chunks(target), strict=True)
    return torch.cat([errors(a.to(device), b.to(device)) for a, b in pairs])


def worse_than_nearest(
    cache: UnitCache | NetworkCache, images: Tensor, out: Tensor, mean: Mean, processes: int = 1
) -> bool:
    """Whether the calibrated network, whose output for the cache's `images` is `out`, does worse than it started.

    Judged like the last epoch where there is one, else by the squared error that units are calibrated for: what they
    give need not be scores of classes.
    """
    rows, last = cache.judged, isinstance(cache, NetworkCache)
    errors: Errors = prediction_errors if last else squared_errors
    target = (cache.features if last else cache.teacher_out)[rows]
    with initial_ranges(cache.student):
        nearest = run_chunked(cache.student, images[rows], cache.device, cache.store)
    after, before = (_each(errors, x, target, cache.device) for x in (out[rows], nearest))
    return not no_worse(after, before, mean, processes, _USUAL_GROWTH)


def put_back(
    teacher: Chain,
    student: Chain,
    images: Tensor,
    importance: Sequence[Tensor | None],
    reports: Sequence[UnitReport],
    device: torch.device,
    mean: Mean,
) -> list[UnitReport]:
    """Put the whole of `student` back to where it started; what the `reports` have to say then, on these images."""
    restore_initial(student)
    found = [Comparison(device, importance=weights) for weights in (*importance, None)]
    with torch.no_grad():
        for some in chunks(images):
            x = y = some.to(device)
            for k, (unit, teacher_unit, comparison) in enumerate(
                zip(student.units, teacher.units, found, strict=False)
            ):
                x, y = unit(x), teacher_unit(y)
                comparison.dim = student.channel_dim(k, y.shape)
                comparison.update(x, y)
            found[-1].update(x, y)
    units: list[tuple[str, nn.Module]] = [*zip(student.names, student.units, strict=True), (NETWORK, student)]
    now: list[UnitReport] = []
    for (name, unit), comparison, old in zip(units, found, reports, strict=False):
        error = float(mean(comparison.errors.mean()))
        new = report(name, unit, comparison, (error, error), False, mean)
        now.append(replace(new, seconds=old.seconds))
    return now
