"""Losses of the whole network against their definitions."""

from __future__ import annotations

import pytest
import torch

from lightning_ptq.losses import PredictionDifference, Tail, prediction_loss
from tests.losses.helpers import unit_batch


def test_prediction_loss_is_the_divergence_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, 3, generator=generator).double().unbind(0)
    expected = []
    for image in range(6):
        for position in range(3):
            p = [float(v) for v in teacher[image, :, position].exp()]
            q = [float(v) for v in student[image, :, position].exp()]
            pairs = [(a / sum(p), b / sum(q)) for a, b in zip(p, q, strict=True)]
            expected.append(sum(a * float(torch.tensor(a / b).double().log()) for a, b in pairs))
    assert float(prediction_loss(student, teacher)) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert float(prediction_loss(teacher, teacher)) == pytest.approx(0.0, abs=1e-6)


def test_temperature_divides_both_logits() -> None:
    student, teacher = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(prediction_loss(student, teacher, 4.0), prediction_loss(student / 4, teacher / 4))


def test_prediction_difference_is_taken_behind_the_tail() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, generator=generator).unbind(0)
    matrix = torch.randn(5, 3, generator=generator)
    batch = unit_batch(student, teacher, tail=Tail(lambda x, n: x @ matrix, 1), teacher_features=teacher @ matrix)
    expected = prediction_loss(student @ matrix / 4, teacher @ matrix / 4)
    torch.testing.assert_close(PredictionDifference(0.1)(batch), expected)


def test_one_output_has_a_squared_error() -> None:
    student, teacher = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert float(prediction_loss(student, teacher)) == pytest.approx(float((student - teacher).square().mean()))
