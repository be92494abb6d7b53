"""AdaRound's regulariser: it lets rounding roam at first and pushes it to 0 or 1 in the end."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ptq.losses.base import Term, UnitBatch, channels_first
from lightning_ptq.losses.gather import processes
from lightning_ptq.losses.reconstruction import reconstruction_loss
from lightning_ptq.soft_rounding import undecided
from lightning_ptq.store import chunks

# All of a unit's undecided weights together weigh as much as an error that is so many times the unit's signal. For the
# units of CIFAR's ResNet-20 that is a weight of 0.004 to 0.02, where the papers have 0.01.
SHARE = 10.0
# Images that the signal is measured on.
_IMAGES = 256


def annealed_beta(progress: float, *, start: float = 20.0, end: float = 2.0, warmup: float = 0.2) -> float | None:
    """Exponent of the regulariser at `progress` in [0, 1]; None during the warm-up, when it is off."""
    if progress < warmup:
        return None
    return start + (end - start) * (progress - warmup) / (1.0 - warmup)


class RoundingRegularizer(Term):
    """`undecided` of every learned rounding of the unit, times `weight`.

    Args:
        weight: 0.01 in the papers, 0.1 to 0.2 for networks with depthwise layers. None finds one for each unit, from
            the variance of the teacher's output, as the reconstruction weighs it, and the number of weights. What it is
            worth next to the reconstruction then depends neither on the size of activations nor on that of the unit.
    """

    recordable = True

    def __init__(self, weight: float | None = None) -> None:
        super().__init__()
        self.weight = weight
        self._found: Tensor | None = None
        self._found_for: weakref.ref[Tensor] | None = None

    def forward(self, batch: UnitBatch) -> Tensor:
        if batch.beta is None or not batch.roundings:
            return torch.zeros((), device=batch.student_out.device)
        weight = self._weight_for(batch) if self.weight is None else self.weight
        return weight * undecided(batch.roundings, batch.beta)

    def forget(self) -> None:
        """Drop the weight that was found for a unit."""
        self._found = self._found_for = None

    @torch.no_grad()
    def _weight_for(self, batch: UnitBatch) -> Tensor:
        """The unit's weight, (), found once."""
        out = batch.teacher_side.teacher_out
        if self._found is None or self._found_for is None or self._found_for() is not out:
            rows, device = out[:_IMAGES], batch.student_out.device

            def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
                """Over the rows, a few at a time."""
                parts = (channels_first(x, batch.channel_dim).to(device).float() for x in chunks(rows, _IMAGES))
                return torch.stack([of(x) * (len(x) / len(rows)) for x in parts]).sum(0)

            middle = mean(lambda x: x.mean([dim for dim in range(x.dim()) if dim != 1], keepdim=True))
            signal = mean(lambda x: reconstruction_loss(x, middle.expand_as(x), batch.importance))
            if processes() > 1:  # all of them push alike
                torch.distributed.all_reduce(signal)
                signal = signal / processes()
            self._found = SHARE * signal / sum(rounding.numel() for rounding in batch.roundings)
            self._found_for = weakref.ref(out)
        return self._found
