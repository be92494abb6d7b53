"""The contrastive losses against their formulas, written as loops over pairs."""

import math
from collections.abc import Callable

import pytest
import torch

from lightning_ptq.losses.infonce import dcl_loss, debiased_loss, infonce_loss, nce_loss

Slow = Callable[[list[float], list[list[float]]], float]
PRIOR, LOWEST = 0.3, -2.0


def slow_infonce(own: list[float], others: list[list[float]]) -> float:
    rows = zip(own, others, strict=True)
    return sum(-math.log(math.exp(p) / (math.exp(p) + sum(map(math.exp, row)))) for p, row in rows) / len(own)


def slow_nce(own: list[float], others: list[list[float]]) -> float:
    pairs = [s for row in others for s in row]
    positive = sum(math.log1p(math.exp(-p)) for p in own) / len(own)
    return positive + sum(math.log1p(math.exp(s)) for s in pairs) / max(len(pairs), 1)


def slow_dcl(own: list[float], others: list[list[float]]) -> float:
    rows = zip(own, others, strict=True)
    return sum((math.log(sum(map(math.exp, row))) if row else 0.0) - p for p, row in rows) / len(own)


def slow_debiased(own: list[float], others: list[list[float]]) -> float:
    total = 0.0
    for p, row in zip(own, others, strict=True):
        mean = sum(map(math.exp, row)) / max(len(row), 1)
        g = max((mean - PRIOR * math.exp(p)) / (1 - PRIOR), math.exp(LOWEST))
        total -= math.log(math.exp(p) / (math.exp(p) + len(row) * g))
    return total / len(own)


def debiased(positive: torch.Tensor, logits: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    return debiased_loss(positive, logits, negatives, PRIOR, LOWEST)


LOSSES = [(infonce_loss, slow_infonce), (nce_loss, slow_nce), (dcl_loss, slow_dcl), (debiased, slow_debiased)]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("loss", "slow"), LOSSES)
def test_losses_equal_their_formulas(loss: Callable[..., torch.Tensor], slow: Slow, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(6, generator=generator, dtype=torch.float64)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    negatives = torch.rand(6, 9, generator=generator) < share
    others = [[float(s) for s, n in zip(*row, strict=True) if n] for row in zip(logits, negatives, strict=True)]
    value = loss(positive, logits, negatives)
    assert float(value) == pytest.approx(slow(positive.tolist(), others), rel=1e-9)


@pytest.mark.parametrize("loss", [loss for loss, _ in LOSSES])
def test_gradients(loss: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    positive = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    negatives = torch.rand(5, 7, generator=generator) < 0.6
    negatives[0] = False  # a row that collides with all others
    assert torch.autograd.gradcheck(lambda p, s: loss(p, s, negatives), (positive, logits))
