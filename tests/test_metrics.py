"""Metrics against closed forms and slow references."""

import math

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_ptq.losses.critic import projected
from lightning_ptq.metrics import (
    Information,
    MeanIoU,
    MeanRate,
    OutputSQNR,
    alignment,
    classes,
    decibels,
    gaussian_mi,
    mi_lower_bound,
    signal_and_noise,
    uniformity,
)


def test_sqnr_of_known_noise() -> None:
    def sqnr(student: torch.Tensor, teacher: torch.Tensor) -> float:
        return decibels(*signal_and_noise(student, teacher).tolist())

    teacher = torch.tensor([3.0, 4.0])
    assert sqnr(teacher + torch.tensor([0.3, 0.4]), teacher) == pytest.approx(20.0, abs=1e-4)
    assert sqnr(teacher, teacher) == math.inf
    assert sqnr(teacher, torch.zeros(2)) == -math.inf


def test_mi_bound_equals_its_formula() -> None:
    student, teacher = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    mean = teacher.mean(0)
    cosine = torch.nn.functional.cosine_similarity
    loss = 0.0
    for i in range(7):
        s = [math.exp(float(cosine(student[i] - mean, teacher[j] - mean, dim=0)) / 0.1) for j in range(7)]
        loss -= math.log(s[i] / sum(s)) / 7
    assert mi_lower_bound(student, teacher) == pytest.approx(math.log(7) - loss, abs=1e-4)


def test_mi_bound_falls_with_noise_and_is_at_most_log_n() -> None:
    teacher = torch.randn(64, 20)
    noise = torch.randn(64, 20)
    bounds = [mi_lower_bound(teacher + level * noise, teacher) for level in (0.0, 0.5, 2.0, 10.0)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] <= math.log(64)
    assert bounds[-1] < 1.0


def correlated(n: int, d: int, rho: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rows of two Gaussians with correlation rho in each of d dimensions, mixed, and their mutual information."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, n, d, generator=generator)
    mix = torch.randn(d, d, generator=generator)
    return x @ mix + 3.0, (rho * x + (1 - rho**2) ** 0.5 * noise) @ mix.T, -0.5 * d * math.log(1 - rho**2)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.99])
@pytest.mark.parametrize(("n", "d"), [(60, 8), (400, 3)])
def test_gaussian_mi_is_unbiased_for_gaussians_beyond_log_n(n: int, d: int, rho: float) -> None:
    draws = [correlated(n, d, rho, seed) for seed in range(200)]
    estimates = torch.tensor([gaussian_mi(x, y) for x, y, _ in draws])
    error = float(estimates.std()) / 200**0.5
    assert abs(float(estimates.mean()) - draws[0][2]) < 4 * error
    bounds = [mi_lower_bound(x - x.mean(0), y - y.mean(0)) for x, y, _ in draws[:20]]
    assert sum(bounds) / 20 <= draws[0][2] + 0.05, "the bound is below the truth"


def test_gaussian_mi_of_degenerate_rows() -> None:
    x = torch.randn(50, 4)
    assert math.isnan(gaussian_mi(x[:9], x[:9]))
    assert gaussian_mi(x, x) > 20
    assert not math.isfinite(gaussian_mi(torch.zeros(50, 4), x))


def test_alignment_and_uniformity_against_loops() -> None:
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    unit = [v / v.norm() for v in a]
    pairs = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(6) for j in range(i)]
    assert uniformity(a) == pytest.approx(math.log(sum(pairs) / 15), abs=1e-5)
    distances = [float((u - v / v.norm()).square().sum()) for u, v in zip(unit, b, strict=True)]
    assert alignment(a, b) == pytest.approx(sum(distances) / 6, abs=1e-5)
    assert alignment(a, 3 * a) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(uniformity(a[:1]))


def test_information_is_that_of_all_rows_whatever_the_batches() -> None:
    teacher = torch.randn(40, 6, 5, 5)
    student = teacher + 0.5 * torch.randn_like(teacher)
    information = Information()
    for part in (slice(0, 13), slice(13, 40)):
        information.update(student[part], teacher[part])
    values = information.compute()
    x, y = projected(student), projected(teacher)
    assert values["mi_lower_bound_nats"] == pytest.approx(mi_lower_bound(x, y))
    assert values["mi_gaussian_nats"] == pytest.approx(gaussian_mi(x[:, :8], y[:, :8]))
    assert values["alignment"] == pytest.approx(alignment(x - y.mean(0), y - y.mean(0)))
    assert values["uniformity"] == pytest.approx(uniformity(x - y.mean(0)))


def test_rates_count_over_batches() -> None:
    rate = MeanRate()
    rate.update(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 0]))
    rate.update(torch.tensor([5]), torch.tensor([0]))
    assert float(rate.compute()) == 50.0


def test_classes_of_dense_outputs() -> None:
    assert classes(torch.randn(2, 5, 3, 4)).shape == (2, 3, 4)


def test_mean_iou_equals_torchmetrics_own() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 4, 5, 5, generator=generator)
    outputs[:, 3] = -9.0  # a class that neither is predicted nor occurs does not count
    labels = torch.randint(0, 3, (6, 5, 5), generator=generator)
    labels[labels.float().add(torch.rand(labels.shape, generator=generator)) > 2.8] = 255
    ours, theirs = MeanIoU(), MulticlassJaccardIndex(4, average="none", ignore_index=255)
    for part in (slice(0, 2), slice(2, 6)):
        ours.update(outputs[part], labels[part])
        theirs.update(outputs[part], labels[part])
    assert float(ours.compute()) == pytest.approx(100 * float(theirs.compute()[:3].mean()), abs=1e-4)
    ours.reset()
    ours.update(outputs[:1, :3], labels[:1])
    assert ours.confusion.shape == (3, 3)


def test_output_sqnr_is_that_of_all_outputs_together() -> None:
    teacher, student = torch.randn(8, 3), torch.randn(8, 3)
    metric = OutputSQNR()
    for part in (slice(0, 3), slice(3, 8)):
        metric.update(student[part], teacher[part])
    expected = 10 * math.log10(float(teacher.square().sum() / (student - teacher).square().sum()))
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-4)
