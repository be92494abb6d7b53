"""Figures show what they are given where it belongs: points in their unit, labels beside lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_ptq.report import figures, unit_figures
from lightning_ptq.report.run import Run


def run(summary: dict[str, Any] | None = None, **record: Any) -> Run:
    return Run(Path("run"), summary or {}, record)


@pytest.mark.parametrize("steps", [[50], [1], [5, 10, 15, 20, 25], [4, 6]])
def test_points_of_a_loss_lie_within_their_unit_and_the_frame(steps: list[int]) -> None:
    curve = {"step": steps, "reconstruction": [1.0] * len(steps)}
    figure = unit_figures.losses(run(curves={"a": curve, "b": curve}))
    assert figure is not None
    axes = figure.axes[0]
    length = steps[-1]
    assert axes.get_xlim() == (0, 2 * length)
    first, second = (line.get_xdata() for line in axes.lines[:2])
    assert all(0.01 * length < x < 0.99 * length for x in first)
    assert all(1.01 * length < x < 1.99 * length for x in second)


def test_values_stand_clear_of_the_teachers_line() -> None:
    shown = {"nearest_top1": 87.4, "student_top1": 87.5, "teacher_top1": 90.0}
    figure = figures.side_by_side([run(shown), run(shown | {"nearest_top1": 10.0})], ["a", "b"])
    assert figure is not None
    figure.draw_without_rendering()
    axes = figure.axes[0]
    teacher = axes.transData.transform((90.0, 0.0))[0]
    labels = [text.get_window_extent() for text in axes.texts]
    assert len(labels) == 4
    assert all(label.x0 > teacher + 2 and label.x1 <= axes.bbox.x1 for label in labels)
