"""Loss terms on activations of any size, against their formulas in float64."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ptq import functional as F
from lightning_ptq.losses import Contrastive, ContrastiveConfig, Objective, Reconstruction, Term, UnitBatch
from lightning_ptq.losses.base import _gradient_norm
from lightning_ptq.losses.contrastive import ContrastiveLoss
from lightning_ptq.losses.critic import FeatureMap
from lightning_ptq.losses.prediction import prediction_loss
from lightning_ptq.losses.reconstruction import RelativeReconstruction, reconstruction_loss
from tests.losses.helpers import unit_batch
from tests.strategies import MAGNITUDES, rows

pytestmark = pytest.mark.usefixtures("both_ways")

fast = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**16)


def pair(seed: int, magnitude: float, shape: tuple[int, ...] = (6, 5), noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """(student, teacher) of one magnitude."""
    teacher, other = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).double().unbind(0)
    return ((teacher + noise * other) * magnitude).float(), (teacher * magnitude).float()


def similarities(student: Tensor, teacher: Tensor, similarity: str, temperature: float) -> Tensor:
    """(B, N) in float64, pair by pair."""
    s, t = student.double(), teacher.double()
    if similarity == "cosine":
        return torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in t]) for a in s]) / temperature
    variance = (t - t.mean(0)).square().sum(1).mean()
    return torch.stack([torch.stack([-(a - b).square().sum() for b in t]) for a in s]) / (2 * temperature * variance)


def contrastive_truth(logits: Tensor, loss: str, prior: float, lowest: float) -> float:
    """Each of the four losses in Python's floats; everything but the row's own column is a negative."""
    values: list[list[float]] = logits.tolist()
    total, everything = 0.0, []
    for i, row in enumerate(values):
        own, others = row[i], [v for j, v in enumerate(row) if j != i]
        everything += others
        top = max(row)
        sum_of_others = sum(math.exp(v - top) for v in others)
        if loss == "infonce":
            total += top + math.log(math.exp(own - top) + sum_of_others) - own
        elif loss == "dcl":
            total += top + math.log(sum_of_others) - own
        elif loss == "nce":
            total += max(-own, 0.0) + math.log1p(math.exp(-abs(own)))
        else:
            hidden = (sum_of_others / len(others) - prior * math.exp(own - top)) / (1 - prior)
            hidden = max(hidden, math.exp(lowest - top))
            total += top + math.log(math.exp(own - top) + len(others) * hidden) - own
    of_negatives = sum(max(v, 0.0) + math.log1p(math.exp(-abs(v))) for v in everything) / len(everything)
    return total / len(values) + (of_negatives if loss == "nce" else 0.0)


@pytest.mark.parametrize("similarity", ["cosine", "gaussian"])
@pytest.mark.parametrize("loss", get_args(ContrastiveLoss))
@given(seed=SEEDS, magnitude=MAGNITUDES)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_the_contrastive_term_is_its_formula_at_any_magnitude(
    loss: Any, similarity: Any, seed: int, magnitude: float
) -> None:
    student, teacher = pair(seed, magnitude)
    config = ContrastiveConfig(loss=loss, similarity=similarity, feature="output", collisions="keep", temperature=0.2)
    student.requires_grad_()
    value = Contrastive(config)(unit_batch(student, teacher))
    logits = similarities(student.detach(), teacher, similarity, 0.2)
    lowest = -5.0 if similarity == "cosine" else -math.inf
    assert float(value.detach()) == pytest.approx(contrastive_truth(logits, loss, 0.1, lowest), rel=1e-3, abs=1e-4)
    # A loss that no common factor changes has a gradient that falls by it: theirs times the magnitude is one number.
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    once, teacher_once = (x.detach() / F.binade(teacher.abs().max()) for x in (student, teacher))
    once.requires_grad_()
    Contrastive(config)(unit_batch(once, teacher_once)).backward()
    assert once.grad is not None
    torch.testing.assert_close(
        student.grad.double() * F.binade(teacher.abs().max()).double(), once.grad.double(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("feature", get_args(FeatureMap))
@pytest.mark.parametrize("similarity", ["cosine", "gaussian"])
@given(x=rows(most=4, longest=12), y=rows(most=4, longest=12), loss=st.sampled_from(get_args(ContrastiveLoss)))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_the_contrastive_term_is_finite_whatever_is_compared(
    feature: Any, similarity: Any, x: Tensor, y: Tensor, loss: Any
) -> None:
    """Images of different magnitudes, dead and constant ones, students that have nothing of their teacher."""
    count, width = min(len(x), len(y)), min(x.shape[1], y.shape[1])
    student, teacher = x[:count, :width].clone().requires_grad_(), y[:count, :width].clone()
    config = ContrastiveConfig(loss=loss, similarity=similarity, feature=feature, collisions="similarity")
    value = Contrastive(config)(unit_batch(student, teacher))
    assert value.isfinite()
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all() or float(student.detach().abs().max()) < 1e-25, "a slope of 1 over nothing"


@given(seed=SEEDS, power=st.integers(-30, 18), shape=st.sampled_from([(1, 1), (4, 3), (2, 3, 5), (2, 3, 2, 2)]))
@fast
def test_reconstruction_is_its_formula(seed: int, power: int, shape: tuple[int, ...]) -> None:
    student, teacher = pair(seed, 10.0**power, shape)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(seed))
    places = student.numel() / shape[1]
    for weights in (None, importance):
        truth = 0.0
        for s, t, index in zip(student.flatten().tolist(), teacher.flatten().tolist(), range(10**6), strict=False):
            channel = index // math.prod(shape[2:]) % shape[1]
            truth += (1.0 if weights is None else float(weights[channel])) * (s - t) ** 2 / places
        assert float(reconstruction_loss(student, teacher, weights)) == pytest.approx(truth, rel=1e-4, abs=1e-37)


@given(seed=SEEDS, magnitude=MAGNITUDES, shape=st.sampled_from([(1, 1), (1, 3), (4, 3), (2, 3, 2, 2)]))
@fast
def test_the_relative_error_depends_on_no_magnitude(seed: int, magnitude: float, shape: tuple[int, ...]) -> None:
    student, teacher = pair(seed, magnitude, shape)
    value = float(RelativeReconstruction(0.5)(unit_batch(student, teacher)))
    s, t = student.double(), teacher.double()
    largest = float(t.abs().max())
    variance = float(t.var()) if t.numel() > 1 else 0.0
    assert math.isfinite(value)
    if variance > 1e-6 * largest**2:
        assert value == pytest.approx(0.5 * float((s - t).square().mean()) / variance, rel=1e-4)


@given(student=rows(most=4, longest=8), teacher=rows(most=4, longest=8), temperature=st.sampled_from([1.0, 4.0]))
@fast
def test_the_divergence_of_predictions_is_its_formula(student: Tensor, teacher: Tensor, temperature: float) -> None:
    count, width = min(len(student), len(teacher)), min(student.shape[1], teacher.shape[1])
    if width < 2:
        return
    student, teacher = student[:count, :width].clone().requires_grad_(), teacher[:count, :width]
    value = prediction_loss(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all()
    truth = 0.0
    for s, t in zip((student.detach() / temperature).tolist(), (teacher / temperature).tolist(), strict=True):
        logs = [[v - max(row) - math.log(sum(math.exp(w - max(row)) for w in row)) for v in row] for row in (s, t)]
        truth += sum(math.exp(q) * (q - p) for p, q in zip(*logs, strict=True)) / count
    assert float(value.detach()) == pytest.approx(truth, rel=1e-3, abs=1e-4)


@given(seed=SEEDS, magnitude=MAGNITUDES)
@fast
def test_balance_holds_at_any_magnitude(seed: int, magnitude: float) -> None:
    """A balanced term's gradient has a quarter of the first term's norm, however small or large both are."""
    assume(1e-24 < magnitude < 1e24)  # else the weight between them is no float32

    class Pull(Term):
        rho = 0.25

        def forward(self, batch: UnitBatch) -> Tensor:
            return (batch.student_out * (3.0 / magnitude)).sum()

    class Push(Reconstruction):
        def forward(self, batch: UnitBatch) -> Tensor:
            return (batch.student_out * magnitude**0.5).sum()

    student, teacher = pair(seed, 1.0)
    student.requires_grad_()
    terms = Objective({"push": Push(), "pull": Pull()}, units=1)(unit_batch(student, teacher))
    (gradient,) = torch.autograd.grad(terms["pull"], student)
    assert float(gradient.double().norm()) == pytest.approx(0.25 * magnitude**0.5 * 30**0.5, rel=1e-4)


@given(x=rows())
@fast
def test_a_gradient_s_norm_is_that_of_float64(x: Tensor) -> None:
    at = torch.zeros_like(x, requires_grad=True)
    assert float(_gradient_norm((at * x).sum(), at)) == pytest.approx(float(x.double().norm()), rel=1e-5)
