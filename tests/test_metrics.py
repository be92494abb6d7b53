"""Metrics against closed forms and slow references."""

import math

import pytest
import torch

from lightning_ptq.metrics import MeanRate, classes, mi_lower_bound, sqnr_db


def test_sqnr_of_known_noise() -> None:
    teacher = torch.tensor([3.0, 4.0])
    assert sqnr_db(teacher + torch.tensor([0.3, 0.4]), teacher) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db(teacher, teacher) == math.inf
    assert sqnr_db(teacher, torch.zeros(2)) == -math.inf


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


def test_rates_count_over_batches() -> None:
    rate = MeanRate()
    rate.update(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 0]))
    rate.update(torch.tensor([5]), torch.tensor([0]))
    assert float(rate.compute()) == 50.0


def test_classes_of_dense_outputs() -> None:
    assert classes(torch.randn(2, 5, 3, 4)).shape == (2, 3, 4)
