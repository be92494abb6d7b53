"""The last epoch: the whole network as one more unit.

Unit by unit, each error is judged where it arises. What remains is judged at the output: activation scales and, for
every channel of every layer, a gain on the quantized weights and a shift of the bias are trained together, from where
the units left them, and so is the weights' rounding if asked for. None of it costs anything at inference, since gains
go into the weights' scales and shifts into the biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.cache import Minibatch, UnitCache, judged_rows, run_chunked, take
from lightning_ptq.calibration import UnitReport, no_worse, report, restore_initial
from lightning_ptq.graph.units import Chain
from lightning_ptq.losses.base import channels_first
from lightning_ptq.losses.prediction import prediction_errors, prediction_loss
from lightning_ptq.losses.reconstruction import reconstruction_loss, squared_errors
from lightning_ptq.quantizers import act_quantizers, initial_ranges, weight_quantizers

# What this epoch is called where the others bear their unit's name.
NETWORK = "whole-network"

# Where no images are held out, the epoch is undone if the divergence on the calibration images grew by more than this
# factor. Not by any growth: the units have fitted these very images, and the epoch takes some of that back.
HARM = 1.25

Mean = Callable[[Tensor], Tensor]
# Divergences of images that are recognised well are next to nothing, and may grow by half of that.
_USUAL_GROWTH = 1.5


class NetworkCache:
    """What the whole network reads and should give: images, and the teacher's input and output of the head.

    The head is the last unit.

    Args:
        student: a chain of two units at least.
        images: this process's calibration images (N, C, H, W). teacher_out, features: what the teacher makes of them.
        device: where units run; the tensors may lie in host memory.
        drawn: so many of the images, the first ones, are drawn for steps; the others judge.
        rounding: the epoch trains the weights' rounding too.
    """

    def __init__(
        self,
        student: Chain,
        images: Tensor,
        teacher_out: Tensor,
        features: Tensor,
        device: torch.device,
        drawn: int,
        rounding: bool = False,
    ) -> None:
        self.student, self.device, self.drawn = student, device, drawn
        self.learned = [q.log_scale for q in act_quantizers(student)]
        for q in weight_quantizers(student):
            self.learned += [*q.corrections, *(q.roundings if rounding else ())]
        self.images, self.teacher_out, self.features = images, teacher_out, features

    @property
    def judged(self) -> slice:
        """Rows that judge: those held out, or else some that are drawn."""
        return judged_rows(self.drawn, len(self.images))

    def minibatch(self, index: Tensor, corrected: bool = False) -> Minibatch:
        """Rows `index` (B,) of the caches; the unit's output is the input of the head."""
        index = index.to(self.images.device)
        images, teacher_out, features = (
            take(t, index).to(self.device, non_blocking=True) for t in (self.images, self.teacher_out, self.features)
        )
        return Minibatch(images, images, teacher_out, features, index.to(self.device))

    def student_out(self) -> Tensor:
        """The student's final output for all images, as quantized now; finite or not."""
        return run_chunked(self.student, self.images, self.device)


@dataclass(frozen=True)
class NetworkStart:
    """Where the last epoch began, for the judgement at its end: what a checkpoint in its middle must hold.

    Attributes:
        learned: copies of what the epoch may train, `NetworkCache.learned`, in host memory.
        prediction: `prediction_loss` of the student. mse: `reconstruction_loss` of its output.
    """

    learned: list[Tensor]
    prediction: float
    mse: float

    @classmethod
    def of(cls, cache: NetworkCache, out: Tensor, mean: Mean) -> NetworkStart:
        """The student as it stands, whose output for the cache's images is `out`."""
        learned = [parameter.detach().cpu().clone() for parameter in cache.learned]
        return cls(learned, *_errors(cache, out, mean))

    def restore(self, cache: NetworkCache) -> None:
        """Put the cache's student back."""
        for parameter, saved in zip(cache.learned, self.learned, strict=True):
            parameter.data.copy_(saved)

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors only; not copies of them."""
        return dict(vars(self))


def finish_network(cache: NetworkCache, start: NetworkStart, mean: Mean) -> tuple[UnitReport, Tensor]:
    """Judge the last epoch by the network's predictions, undo it where it did harm, and say what happened.

    Returns:
        (report, the network's final output for all cached images).
    """
    out = cache.student_out()
    after, mse = _errors(cache, out, mean)
    limit = start.prediction * (HARM if cache.drawn == len(cache.images) else 1.0)
    # Not `after > limit`: a NaN must be rejected too.
    accepted = after <= limit and math.isfinite(mse)
    if not accepted:
        start.restore(cache)
        out, mse = cache.student_out(), start.mse
    rows = cache.judged
    errors = (start.mse, mse)
    return report(NETWORK, cache.student, out[rows], cache.features[rows], errors, accepted, mean), out


def _errors(cache: NetworkCache, out: Tensor, mean: Mean) -> tuple[float, float]:
    # All rows where none are held out: each has its say about the network.
    rows = slice(cache.drawn, None) if cache.drawn < len(cache.images) else slice(None)
    out, target = out[rows], cache.features[rows]
    prediction, mse = mean(torch.stack([prediction_loss(out, target), reconstruction_loss(out, target)])).tolist()
    return prediction, mse


def worse_than_nearest(cache: UnitCache | NetworkCache, images: Tensor, out: Tensor, mean: Mean) -> bool:
    """Whether the calibrated network, whose output for the cache's `images` is `out`, does worse than it started.

    Judged like the last epoch where there is one, else by the squared error that units are calibrated for: what they
    give need not be scores of classes.
    """
    rows, last = cache.judged, isinstance(cache, NetworkCache)
    errors, target = (prediction_errors, cache.features) if last else (squared_errors, cache.teacher_out)
    with initial_ranges(cache.student):
        nearest = run_chunked(cache.student, images[rows].to(out.device), cache.device)
    return not no_worse(errors(out[rows], target[rows]), errors(nearest, target[rows]), mean, _USUAL_GROWTH)


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
    x = y = images
    units = zip(student.names, student.units, teacher.units, importance, strict=True)
    now: list[UnitReport] = []
    for k, (name, unit, teacher_unit, weights) in enumerate(units):
        x, y = run_chunked(unit, x, device), run_chunked(teacher_unit, y, device)
        dim = student.channel_dim(k, y.shape)
        now.append(_unchanged(name, unit, channels_first(x, dim), channels_first(y, dim), weights, mean))
    if len(reports) > len(student):
        now.append(_unchanged(NETWORK, student, x, y, None, mean))
    return [replace(new, seconds=old.seconds) for new, old in zip(now, reports, strict=True)]


def _unchanged(
    name: str, unit: nn.Module, out: Tensor, target: Tensor, importance: Tensor | None, mean: Mean
) -> UnitReport:
    error = float(mean(squared_errors(out, target, importance).mean()))
    return report(name, unit, out, target, (error, error), False, mean)
