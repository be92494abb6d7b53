"""Figures show what they are given where it belongs: points in their unit, labels beside lines."""

from __future__ import annotations

from io import BytesIO
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


@pytest.mark.parametrize("after", [0.23688465356826782, 0.2368846535682679, 0.1, 0.0, None])
def test_one_unit_has_a_place_within_its_axis(after: float | None) -> None:
    unit = {"name": "conv", "mse_before": 0.23688465356826782, "mse_after": after, "accepted": False, "seconds": 3.0}
    unit |= {"sqnr_db": 13.0, "mi_lower_bound_nats": 3.7, "flipped_fraction": 0.0}
    figure = unit_figures.units(run({"units": [unit]}))
    assert figure is not None
    figure.savefig(BytesIO())  # warns where a range is empty
    low, high = figure.axes[0].get_xlim()
    assert low < unit["mse_before"] < high
    assert high > 1.01 * low


def test_a_network_without_signal_has_an_axis_all_the_same() -> None:
    rates = ("teacher_top1", "nearest_top1", "student_top1", "teacher_agreement", "nearest_agreement")
    figure = figures.result(run(dict.fromkeys(rates) | {"nearest_sqnr_db": 0.0, "student_sqnr_db": 0.0}))
    assert figure is not None
    figure.savefig(BytesIO())


def confused(classes: int, pairs: list[list[int]], names: list[str] | None = None) -> dict[str, Any]:
    one = {"classes": classes, "images": 40, "pairs": pairs} | ({"names": names} if names else {})
    return {"nearest": one, "student": one}


def test_classes_have_their_names_or_their_numbers() -> None:
    names = ["bird", "cat", "a dog with a very long name"]
    pairs = [[0, 0, 30], [0, 1, 9], [2, 2, 1]]
    for given, shown in ((names, ["bird", "cat", "a do…ng name"]), (None, ["0", "1", "2"])):
        figure = figures.confusion(run(confusion=confused(3, pairs, given)))
        assert figure is not None
        figure.draw_without_rendering()
        assert all(axes.title.get_window_extent().x1 <= figure.bbox.x1 for axes in figure.axes)
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
            assert [label.get_text() for label in axis.get_ticklabels()] == shown


def test_of_many_classes_the_most_frequent_changes_are_named() -> None:
    names = [f"class {i}" for i in range(1000)]
    figure = figures.confusion(run(confusion=confused(1000, [[7, 8, 2], [8, 7, 1]], names)))
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "class 7 → class 8",
        "class 8 → class 7",
    ]
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks()), "images are whole"
    same = figures.confusion(run(confusion=confused(1000, [])))
    assert same is not None
    assert same.axes[0].get_title(loc="left") == "nearest: no image changed"


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
