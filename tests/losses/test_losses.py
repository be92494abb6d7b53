"""Loss terms against slow references written from their formulas."""

import pytest
import torch

from lightning_ptq.losses import Objective, Reconstruction, Term, UnitBatch, reconstruction_loss
from lightning_ptq.losses.base import BALANCE_STEPS, _gradient_norm
from lightning_ptq.losses.rounding import SHARE, RoundingRegularizer, annealed_beta
from tests.losses.helpers import unit_batch

pytestmark = pytest.mark.usefixtures("both_ways")

torch.manual_seed(0)


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


def test_the_regulariser_adds_what_is_undecided_of_every_layer() -> None:
    h = [torch.tensor([0.0, 1.0, 0.5]), torch.tensor([[0.25]])]
    batch = unit_batch(torch.zeros(2, 3), torch.zeros(2, 3), roundings=h, beta=11.0)
    slow = sum(1 - abs(2 * float(v) - 1) ** 11.0 for part in h for v in part.flatten())
    assert float(RoundingRegularizer(0.03)(batch)) == pytest.approx(0.03 * slow)
    batch.beta = None
    assert float(RoundingRegularizer(0.03)(batch)) == 0.0


def test_the_regulariser_finds_its_weight_from_the_units_signal_and_size() -> None:
    h = [torch.tensor([0.0, 1.0, 0.5]), torch.tensor([[0.25]])]
    teacher, importance = torch.randn(6, 3, 5), torch.tensor([0.5, 2.0, 0.25])
    signal = 0.0
    for c in range(3):
        values = [float(teacher[b, c, i]) for b in range(6) for i in range(5)]
        mean = sum(values) / 30
        signal += float(importance[c]) * sum((v - mean) ** 2 for v in values) / 30
    undecided = sum(1 - abs(2 * float(v) - 1) ** 11.0 for part in h for v in part.flatten())
    batch = unit_batch(torch.zeros(6, 3, 5), teacher, roundings=h, beta=11.0, importance=importance)
    term = RoundingRegularizer()
    assert float(term(batch)) == pytest.approx(SHARE * signal / 4 * undecided, rel=1e-5)
    # Found once for a unit: what it was found from may change, unless it is another unit's.
    batch.importance = None
    assert float(term(batch)) == pytest.approx(SHARE * signal / 4 * undecided, rel=1e-5)
    larger = unit_batch(torch.zeros(6, 3, 5), 3 * teacher, roundings=h, beta=11.0, importance=importance)
    assert float(term(larger)) == pytest.approx(9 * SHARE * signal / 4 * undecided, rel=1e-5)


def test_a_gradient_norm_survives_half_precision() -> None:
    exact = torch.full((64, 64, 32), 1e-3).requires_grad_()
    half = exact.detach().half().requires_grad_()
    norms = [_gradient_norm(at.float().square().mean(), at) for at in (exact, half)]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-3, atol=0)


class Pull(Term):
    """A term whose gradient at the output is a known multiple of the output."""

    rho = 0.25

    def forward(self, batch: UnitBatch) -> torch.Tensor:
        return 7.0 * batch.student_out.square().sum()


def test_a_gradient_norm_of_many_numbers_is_exact() -> None:
    """As those of a first layer's output; float32 loses a part in 500 of it."""
    at = torch.zeros(2**25, requires_grad=True)
    target = torch.randn(2**25, generator=torch.Generator().manual_seed(0))
    expected = float(torch.linalg.vector_norm(target, dtype=torch.float64))
    assert float(_gradient_norm((at * target).sum(), at)) == pytest.approx(expected, rel=1e-6)


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


def test_a_term_for_every_third_step_counts_three_times_there_and_is_balanced_over_its_own_steps() -> None:
    class Dear(Pull):
        every = 3

    objective, teacher = Objective({"reconstruction": Reconstruction(), "dear": Dear()}, units=1), torch.randn(4, 3)
    ratios = []
    for step in range(3 * BALANCE_STEPS + 4):
        student = torch.randn(4, 3, requires_grad=True)
        value = float(objective(unit_batch(student, teacher, step))["dear"].detach())
        if step % 3:
            assert value == 0.0
            continue
        rec = torch.autograd.grad(reconstruction_loss(student, teacher), student)[0].norm()
        ratios.append(float(rec / (14.0 * student.detach()).norm()))
        weight = 0.25 * sum(ratios[:BALANCE_STEPS]) / min(len(ratios), BALANCE_STEPS)
        assert value == pytest.approx(3 * weight * float(7.0 * student.detach().square().sum()), rel=1e-4)


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_the_weighted_error_is_that_of_its_formula(layout: torch.memory_format) -> None:
    student, teacher, importance = torch.randn(2, 6, 3, 4), torch.randn(2, 6, 3, 4), torch.rand(6)
    copy = student.to(memory_format=layout, copy=True).requires_grad_()
    (gradient,) = torch.autograd.grad(
        3.0 * reconstruction_loss(copy, teacher.to(memory_format=layout), importance), copy
    )
    torch.testing.assert_close(gradient, 6.0 * (student - teacher) * importance.view(-1, 1, 1) / 24)


def test_a_unit_with_nothing_to_learn_needs_no_weights_of_terms() -> None:
    class Other(Term):
        rho = 1.0

        def forward(self, batch: UnitBatch) -> torch.Tensor:
            return batch.student_out.square().mean()

    objective = Objective({"reconstruction": Reconstruction(), "other": Other()}, 1)
    terms = objective(unit_batch(torch.randn(2, 3), torch.randn(2, 3)))
    assert float(terms["other"]) == 0.0
