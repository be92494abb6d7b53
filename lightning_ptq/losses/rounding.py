"""AdaRound's regulariser: it lets rounding roam at first and pushes it to 0 or 1 in the end."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ptq.functional import undecided
from lightning_ptq.losses.base import Term, UnitBatch


def annealed_beta(progress: float, *, start: float = 20.0, end: float = 2.0, warmup: float = 0.2) -> float | None:
    """Exponent of the regulariser at `progress` in [0, 1]; None during the warm-up, when it is off."""
    if progress < warmup:
        return None
    return start + (end - start) * (progress - warmup) / (1.0 - warmup)


class RoundingRegularizer(Term):
    """`undecided` of every learned rounding of the unit, times `weight`.

    Args:
        weight: 0.01 in the papers, 0.1 to 0.2 for networks with depthwise layers.
    """

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, batch: UnitBatch) -> Tensor:
        beta = annealed_beta(batch.progress)
        if beta is None or not batch.roundings:
            return torch.zeros((), device=batch.student_out.device)
        return self.weight * undecided(batch.roundings, beta)
