"""Loss terms against slow references written from their formulas."""

import math
from typing import Any, get_args

import pytest
import torch

from lightning_ptq.losses import Objective, Reconstruction, Term, UnitBatch, reconstruction_loss
from lightning_ptq.losses.base import BALANCE_STEPS
from lightning_ptq.losses.contrastive import (
    Contrastive,
    ContrastiveConfig,
    ContrastiveLoss,
    collision_free,
    dcl_loss,
    debiased_loss,
    infonce_loss,
    nce_loss,
    similarities,
)
from lightning_ptq.losses.rounding import annealed_beta

torch.manual_seed(0)


def unit_batch(student: torch.Tensor, teacher: torch.Tensor, step: int = 0, **changes: object) -> UnitBatch:
    values = {"student_out": student, "teacher_out": teacher, "teacher_features": teacher, "tail": lambda x: x}
    values |= {"student_unit": torch.nn.Identity(), "unit": 0, "step": step, "progress": 0.5}
    return UnitBatch(**(values | changes))


def slow_infonce(student: torch.Tensor, teacher: torch.Tensor, tau: float, negative: list[list[bool]]) -> float:
    n, total = len(student), 0.0
    cosine = torch.nn.functional.cosine_similarity
    for i in range(n):
        s = [float(cosine(student[i], teacher[j], dim=0)) / tau for j in range(n)]
        others = sum(math.exp(s[j]) for j in range(n) if negative[i][j])
        total -= math.log(math.exp(s[i]) / (math.exp(s[i]) + others))
    return total / n


def slow_nce(student: torch.Tensor, teacher: torch.Tensor, tau: float, negative: list[list[bool]]) -> float:
    n = len(student)
    cosine = torch.nn.functional.cosine_similarity
    s = [[float(cosine(student[i], teacher[j], dim=0)) / tau for j in range(n)] for i in range(n)]
    positives = sum(math.log1p(math.exp(-s[i][i])) for i in range(n)) / n
    pairs = [(i, j) for i in range(n) for j in range(n) if negative[i][j]]
    return positives + sum(math.log1p(math.exp(s[i][j])) for i, j in pairs) / max(len(pairs), 1)


def slow_dcl(student: torch.Tensor, teacher: torch.Tensor, tau: float, negative: list[list[bool]]) -> float:
    n, total = len(student), 0.0
    cosine = torch.nn.functional.cosine_similarity
    for i in range(n):
        s = [float(cosine(student[i], teacher[j], dim=0)) / tau for j in range(n)]
        others = [math.exp(s[j]) for j in range(n) if negative[i][j]]
        total += (math.log(sum(others)) if others else 0.0) - s[i]
    return total / n


def slow_debiased(student: torch.Tensor, teacher: torch.Tensor, tau: float, negative: list[list[bool]]) -> float:
    n, total, prior = len(student), 0.0, 0.3
    cosine = torch.nn.functional.cosine_similarity
    for i in range(n):
        e = [math.exp(float(cosine(student[i], teacher[j], dim=0)) / tau) for j in range(n)]
        others = [e[j] for j in range(n) if negative[i][j]]
        mean = sum(others) / max(len(others), 1)
        g = max((mean - prior * e[i]) / (1 - prior), math.exp(-1 / tau))
        total -= math.log(e[i] / (e[i] + len(others) * g))
    return total / n


def debiased(logits: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    return debiased_loss(logits, negatives, prior=0.3, temperature=0.2)


LOSSES = [(infonce_loss, slow_infonce), (nce_loss, slow_nce), (dcl_loss, slow_dcl), (debiased, slow_debiased)]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("loss", "slow"), LOSSES)
def test_contrastive_losses_equal_their_formulas(loss: object, slow: object, mask: bool) -> None:
    student, teacher = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    classes = teacher.argmax(1).tolist()
    negative = [[i != j and not (mask and classes[i] == classes[j]) for j in range(6)] for i in range(6)]
    masked = collision_free(teacher, mask)
    assert masked.tolist() == negative
    value = loss(similarities(student, teacher, 0.2), masked)
    assert float(value) == pytest.approx(slow(student, teacher, 0.2, negative), rel=1e-5)


@pytest.mark.parametrize("loss", [loss for loss, _ in LOSSES])
def test_contrastive_gradients(loss: object) -> None:
    logits = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    negatives = collision_free(torch.randn(5, 3))
    assert torch.autograd.gradcheck(lambda s: loss(s, negatives), (logits,))


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("loss", get_args(ContrastiveLoss))
def test_contrastive_term_is_invariant_and_lowest_for_a_perfect_student(loss: Any, two_sided: bool) -> None:
    term = Contrastive(ContrastiveConfig(loss=loss, two_sided=two_sided))
    generator = torch.Generator().manual_seed(0)
    perfect, noisy = [], []
    for _ in range(100):
        teacher, noise = torch.randn(2, 16, 10, generator=generator).unbind(0)
        student = teacher + 0.5 * noise
        order = torch.randperm(16, generator=generator)
        noisy.append(term(unit_batch(student, teacher)))
        torch.testing.assert_close(term(unit_batch(student[order], teacher[order])), noisy[-1])
        perfect.append(term(unit_batch(teacher, teacher)))
    assert sum(perfect) < sum(noisy)
    # The other two also reward noise that takes a student away from its negatives: they are lower only on average.
    if loss in ("infonce", "dcl"):
        assert all(a < b for a, b in zip(perfect, noisy, strict=True))


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("loss", get_args(ContrastiveLoss))
def test_contrastive_term_stays_finite(loss: Any, two_sided: bool) -> None:
    term = Contrastive(ContrastiveConfig(loss=loss, temperature=0.01, two_sided=two_sided))
    same_class = torch.ones(4, 3) * torch.tensor([3.0, 1.0, 0.0])
    opposite = torch.eye(4, 3) - torch.eye(4, 3).roll(1, 0)
    cases = [(s, same_class) for s in (torch.zeros(4, 3), same_class, same_class * 1e6)]
    for student, teacher in [*cases, (-opposite, opposite), (opposite.roll(1, 0), opposite)]:
        student = student.clone().requires_grad_()
        value = term(unit_batch(student, teacher))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


def test_the_gradient_of_dcl_stays_where_that_of_infonce_vanishes() -> None:
    teacher = torch.eye(6)
    gradients = {}
    for loss in ("infonce", "dcl"):
        student = (teacher + 1e-3 * torch.arange(36.0).view(6, 6)).requires_grad_()
        Contrastive(ContrastiveConfig(loss=loss, temperature=0.05))(unit_batch(student, teacher)).backward()
        gradients[loss] = float(student.grad.norm())
    assert gradients["dcl"] > 100 * gradients["infonce"]


def test_two_sided_is_the_mean_of_both_directions() -> None:
    student, teacher = torch.randn(2, 8, 5).unbind(0)
    negatives = collision_free(teacher)
    ways = [
        slow_infonce(*pair, 0.1, mask.tolist())
        for pair, mask in (((student, teacher), negatives), ((teacher, student), negatives.T))
    ]
    term = Contrastive(ContrastiveConfig(two_sided=True))
    assert float(term(unit_batch(student, teacher))) == pytest.approx(sum(ways) / 2, rel=1e-4)


def test_dense_outputs_are_pooled_over_positions() -> None:
    teacher = torch.randn(4, 5, 3, 3)
    term = Contrastive(ContrastiveConfig())
    flat = teacher.mean((2, 3))
    torch.testing.assert_close(term(unit_batch(teacher, teacher)), term(unit_batch(flat, flat)))


def test_reconstruction_sums_channels_and_averages_the_rest() -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    slow = sum(
        float((student[b, c, i, j] - teacher[b, c, i, j]) ** 2)
        for b in range(2) for c in range(3) for i in range(4) for j in range(5)
    ) / (2 * 4 * 5)  # fmt: skip
    assert float(reconstruction_loss(student, teacher)) == pytest.approx(slow, rel=1e-5)


def test_beta_is_off_during_warmup_and_falls_linearly() -> None:
    assert annealed_beta(0.19) is None
    assert [annealed_beta(p) for p in (0.2, 0.6, 1.0)] == pytest.approx([20.0, 11.0, 2.0])


class Pull(Term):
    """A term whose gradient at the output is a known multiple of the output."""

    rho = 0.25

    def forward(self, batch: UnitBatch) -> torch.Tensor:
        return 7.0 * batch.student_out.square().sum()


def test_balance_sets_the_gradient_norm_and_freezes_it() -> None:
    objective = Objective({"reconstruction": Reconstruction(), "pull": Pull()}, units=2)
    teacher = torch.randn(4, 3)
    ratios = []
    for step in range(BALANCE_STEPS + 3):
        student = torch.randn(4, 3, requires_grad=True)
        terms = objective(unit_batch(student, teacher, step))
        rec = torch.autograd.grad(reconstruction_loss(student, teacher), student)[0].norm()
        ratios.append(float(rec / (14.0 * student.detach()).norm()))
        expected = 0.25 * sum(ratios[:BALANCE_STEPS]) / min(step + 1, BALANCE_STEPS)
        assert float(terms["pull"].detach()) == pytest.approx(
            expected * float(7.0 * student.detach().square().sum()), rel=1e-4
        )
    assert objective.ratio_sums[1].sum() == 0


def test_a_term_without_gradient_weighs_nothing() -> None:
    class Constant(Pull):
        def forward(self, batch: UnitBatch) -> torch.Tensor:
            return 0.0 * batch.student_out.sum()

    student = torch.randn(4, 3, requires_grad=True)
    terms = Objective({"reconstruction": Reconstruction(), "constant": Constant()}, 1)(unit_batch(student, student + 1))
    assert float(terms["constant"].detach()) == 0.0


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (2, 6, 3, 3)])
def test_importance_weighs_each_channel_s_squared_error(shape: tuple[int, ...]) -> None:
    student, teacher, importance = torch.randn(shape), torch.randn(shape), torch.rand(6)
    expected = sum(
        float(importance[c]) * float((student[:, c] - teacher[:, c]).square().mean()) for c in range(shape[1])
    )
    assert float(reconstruction_loss(student, teacher, importance)) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        reconstruction_loss(student, teacher, torch.ones(6)), reconstruction_loss(student, teacher)
    )
