"""Results of runs, drawn: each function gives a Figure, or None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_ptq.record import FEW_CLASSES
from lightning_ptq.report.run import Run
from lightning_ptq.report.style import BLUE, GREY, ORANGE, name_rows, new_figure, short, styled, values_of

# Swaps of classes that are shown.
_SWAPS = 15


@styled
def result(run: Run) -> Figure | None:
    """Teacher, rounded to nearest and calibrated: each measure that validation gave."""
    s = run.summary
    agreement = None if s["teacher_agreement"] is None else 100.0
    measures = [
        ("top-1, %", (s["teacher_top1"], s["nearest_top1"], s["student_top1"])),
        ("agreement with the teacher, %", (agreement, s["nearest_agreement"], s["teacher_agreement"])),
        ("mean IoU, %", tuple(s.get(f"{network}_miou") for network in ("teacher", "nearest", "student"))),
    ]
    if s["teacher_agreement"] is None:
        measures.append(("output SQNR, dB", (None, s.get("nearest_sqnr_db"), s.get("student_sqnr_db"))))
    measures = [(title, values) for title, values in measures if any(value is not None for value in values)]
    if not measures:
        return None
    figure = new_figure(1.75)
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, (title, values) in zip(panels, measures, strict=True):
        numbers = values_of(values)
        axes.barh(range(3), numbers, color=[GREY, ORANGE, BLUE], height=0.62)
        name_rows(axes, ["teacher, float", "nearest", "calibrated"])
        axes.set_title(title)
        top = 100.0 if "%" in title else max(0.0, *(value for value in numbers if not math.isnan(value)))
        axes.set_xlim(min(0.0, np.nanmin(numbers)), max(top * 1.14, 1e-9))
        for row, value in enumerate(numbers):
            if not math.isnan(value):
                axes.text(max(value, 0) + 0.012 * top, row, f"{value:.2f}", va="center", fontweight="bold")
    return figure


@styled
def confusion(run: Run) -> Figure | None:
    """What classes of the teacher's became of the student's: a matrix, or the most frequent swaps of many classes."""
    found: dict[str, Any] = run.record.get("confusion", {})
    if not found:
        return None
    networks = [(name, title) for name, title in (("nearest", "nearest"), ("student", "calibrated")) if name in found]
    classes = found[networks[0][0]]["classes"]
    if classes <= FEW_CLASSES:
        longest = max(map(len, _names(found[networks[0][0]])))
        figure = new_figure(min(5.1, 1.9 + 0.16 * classes + 0.09 * longest))  # higher, the width would bound it
        for axes, (name, title) in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
            _matrix(axes, found[name], title)
        return figure
    swaps = {name: found[name]["pairs"][:_SWAPS] for name, _ in networks}
    figure = new_figure(1.1 + 0.23 * max(map(len, swaps.values())))
    panels = figure.subplots(1, len(networks), sharex=True, squeeze=False)[0]
    for axes, (name, title) in zip(panels, networks, strict=True):
        pairs, names = swaps[name], _names(found[name])
        axes.barh(range(len(pairs)), [n for *_, n in pairs], color=ORANGE if name == "nearest" else BLUE, height=0.62)
        name_rows(axes, [f"{names[teacher]} → {names[student]}" for teacher, student, _ in pairs])
        axes.set_title(f"{title}: teacher → student" if pairs else f"{title}: no image changed")
        axes.set_xlabel(f"images of {found[name]['images']:,}")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    return figure


def _names(found: dict[str, Any]) -> list[str]:
    """What the classes are called, or their numbers."""
    return [short(name, 12) for name in found.get("names") or map(str, range(found["classes"]))]


def _matrix(axes: Axes, found: dict[str, Any], title: str) -> None:
    classes = found["classes"]
    counts = np.zeros((classes, classes))
    for teacher, student, images in found["pairs"]:
        counts[teacher, student] = images
    wrong = counts - np.diag(np.diag(counts))
    share = wrong / np.maximum(counts.sum(1, keepdims=True), 1)  # of the teacher's images of the class
    axes.imshow(share, cmap="Oranges" if title == "nearest" else "Blues", vmin=0, vmax=0.5)
    for teacher, student, images in found["pairs"]:
        same = teacher == student
        dark = share[teacher, student] > 0.3
        colour = "#b0b4bc" if same else "white" if dark else "#22262e"
        size = 8 if classes <= 12 else 6
        axes.text(student, teacher, f"{images}", ha="center", va="center", color=colour, fontsize=size)
    names = _names(found)
    axes.set(xlabel="student's class", ylabel="teacher's class")
    axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(classes), names)
    axes.set_title(f"{title}: {int(wrong.sum()):,} of {found['images']:,} images changed")
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


@styled
def side_by_side(runs: Sequence[Run], names: Sequence[str]) -> Figure | None:
    """The result of each run beside rounding to nearest."""
    measures = [
        ("top-1, %", "nearest_top1", "student_top1", "teacher_top1"),
        ("agreement with the teacher, %", "nearest_agreement", "teacher_agreement", None),
        ("output SQNR, dB", "nearest_sqnr_db", "student_sqnr_db", None),
    ]
    has = [m for m in measures if any(run.summary.get(m[2]) is not None for run in runs)]
    shown = has[:2] if has[:1] and has[0][0].startswith("top") else has[-2:]
    if not shown:
        return None
    figure = new_figure(1.1 + 0.42 * len(runs))
    rows = np.arange(len(runs))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (title, nearest, student, teacher) in zip(panels, shown, strict=True):
        name_rows(axes, names)
        for key, colour, label, shift in ((nearest, ORANGE, "nearest", -0.19), (student, BLUE, "calibrated", 0.19)):
            numbers = values_of(run.summary.get(key) for run in runs)
            axes.barh(rows + shift, numbers, height=0.34, color=colour, label=label)
            for row, value in zip(rows, numbers, strict=True):
                if not math.isnan(value):  # at the right edge, where neither bar nor teacher ends
                    axes.text(0.99, row + shift, f"{value:.2f}", transform=axes.get_yaxis_transform(), ha="right",
                              va="center", fontsize=7.5)  # fmt: skip
        if teacher is not None:
            for row, value in zip(rows, values_of(run.summary.get(teacher) for run in runs), strict=True):
                axes.vlines(value, row - 0.4, row + 0.4, color=GREY, linewidth=2)
            axes.plot([], [], color=GREY, linewidth=2, label="teacher")
        axes.margins(x=0.2)
        axes.set_title(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure
