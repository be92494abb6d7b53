"""What became of units and layers, drawn: each function gives a Figure, or None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from lightning_ptq.report.run import Run
from lightning_ptq.report.style import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    ROW,
    TERMS,
    name_rows,
    new_figure,
    plain_log,
    short,
    styled,
    values_of,
)


@styled
def units(run: Run) -> Figure | None:
    """What calibration did to each unit."""
    reports = run.summary["units"]
    if not reports:
        return None
    figure = new_figure(0.95 + ROW * len(reports))
    error, sqnr, information, flipped, seconds = figure.subplots(
        1, 5, sharey=True, width_ratios=[2.2, 1, 1, 1, 1], squeeze=True
    )
    rows = range(len(reports))
    name_rows(error, [unit["name"] for unit in reports])
    before, after = (values_of(unit[key] for unit in reports) for key in ("mse_before", "mse_after"))
    kept = [unit["accepted"] for unit in reports]
    positive = [value for value in (*before, *after) if value > 0]
    if not positive:
        error.set_xlim(-1, 1)
    else:
        error.set_xscale("log")
        plain_log(error.xaxis)
        if max(positive) < 1.001 * min(positive):  # one unit that was put back, say: no range that could be drawn
            error.set_xlim(min(positive) / 1.1, max(positive) * 1.1)
    error.hlines(rows, before, after, color="#c9cdd4", linewidth=2.5, zorder=1)
    error.scatter(before, rows, color=ORANGE, s=26, zorder=2, label="before")
    accepted = [row for row in rows if kept[row]]
    error.scatter([after[row] for row in accepted], accepted, color=BLUE, s=26, zorder=3, label="after")
    back = [row for row in rows if not kept[row]]
    if back:
        error.scatter(
            [before[row] for row in back], back, marker="x", color=RED, s=44, zorder=4, linewidth=2, label="put back"
        )
    error.set_title("error of the output")
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=3, handletextpad=0.1)
    for axes, key, title, factor in (
        (sqnr, "sqnr_db", "SQNR, dB", 1.0),
        (information, "mi_lower_bound_nats", "MI bound, nats", 1.0),
        (flipped, "flipped_fraction", "flipped, %", 100.0),
        (seconds, "seconds", "seconds", 1.0),
    ):
        numbers = [factor * value for value in values_of(unit[key] for unit in reports)]
        axes.barh(rows, numbers, color=[BLUE if k else RED for k in kept], height=0.62, alpha=0.85)
        axes.set_title(title)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        largest = max((value for value in numbers if not math.isnan(value)), default=0.0)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(min(0.0, *(value for value in numbers if not math.isnan(value)), 0.0), 1.32 * max(largest, 1e-9))
        for row, value in zip(rows, numbers, strict=True):
            if not math.isnan(value):
                axes.text(max(value, 0.0) + 0.04 * largest, row, f"{value:.3g}", va="center", fontsize=7.5)
    return figure


@styled
def losses(run: Run) -> Figure | None:
    """Loss terms over the steps of all units, one unit behind the other."""
    curves: dict[str, dict[str, list[float | None]]] = run.record.get("curves", {})
    if not curves:
        return None
    figure = new_figure(2.9)
    axes = figure.subplots()
    colours: dict[str, str] = {}
    ends = [0.0]
    for curve in curves.values():
        steps = values_of(curve["step"])
        # Half an interval to the left, where a point is well within its unit, and the last one within the frame.
        places = [ends[-1] + step - steps[0] / 2 for step in steps]
        for term, values in curve.items():
            if term == "step":
                continue
            colour = colours.setdefault(term, TERMS[len(colours) % len(TERMS)])
            positive = [value if value > 0 else math.nan for value in values_of(values)]
            marker = "o" if len(positive) < 3 else None
            axes.plot(places[-len(positive) :], positive, color=colour, linewidth=1.4, marker=marker, markersize=3)
        ends.append(ends[-1] + steps[-1])
    for term, colour in colours.items():
        axes.plot([], [], color=colour, label=term)
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    axes.set_xlim(0, ends[-1])
    axes.set_ylabel("loss")
    axes.grid(axis="x", visible=False)
    for end in ends[1:-1]:
        axes.axvline(end, color="#c9cdd4", linewidth=0.8)
    middles = [((first + last) / 2, name) for first, last, name in zip(ends, ends[1:], curves, strict=False)]
    shown = middles[:: -(-len(middles) // 14)]
    slanted = len(shown) > 5
    axes.set_xticks(
        [middle for middle, _ in shown],
        [short(name, 20) for _, name in shown],
        rotation=30 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor",
    )
    axes.tick_params(axis="x", length=0)
    axes.set_title(f"{ends[-1]:,.0f} steps, one unit behind the other", pad=22)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=6, borderaxespad=0.1)
    return figure


@styled
def layers(run: Run) -> Figure | None:
    """Size and bits of each layer, and what quantization costs its weights and what it reads."""
    found = run.layers
    if not found:
        return None
    figure = new_figure(0.95 + ROW * len(found))
    size, noise = figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1])
    rows = range(len(found))
    name_rows(size, [layer["name"] for layer in found])
    full = [layer["weights"] * 4 / 1024 for layer in found]
    packed = [layer["weight_bytes"] / 1024 for layer in found]
    size.barh(rows, full, color="#e6e8ec", height=0.62, label="float32")
    size.barh(rows, packed, color=BLUE, height=0.62, label="quantized")
    for row, layer in enumerate(found):
        size.text(full[row] * 1.0 + 0.01 * max(full), row, f"W{layer['weight_bits']} A{layer['act_bits']}  "
                  f"{_kib(packed[row])}", va="center", fontsize=7.5)  # fmt: skip
    size.set_xlim(0, max(full) * 1.28)
    size.set_title("weights, KiB")
    for key, colour, label, marker in (
        ("weights", BLUE, "noise of weights", "s"),
        ("reads", GREEN, "noise of what it reads", "o"),
    ):
        entries = [layer["grid"] if key == "weights" else run.reads(layer) for layer in found]
        numbers = values_of(None if entry is None else entry["sqnr_db"] for entry in entries)
        noise.scatter(numbers, rows, color=colour, marker=marker, s=24, label=label, zorder=2)
    noise.set_title("signal to quantization noise, dB")
    noise.grid(axis="y", visible=True)
    noise.tick_params(axis="y", length=0)
    noise.spines["left"].set_visible(False)
    shown = [axes.get_legend_handles_labels() for axes in (size, noise)]
    handles, labels = ([entry for both in kind for entry in both] for kind in zip(*shown, strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=4, handletextpad=0.4)
    return figure


def _kib(value: float) -> str:
    return f"{value:.1f} KiB" if value < 100 else f"{value / 1024:.2f} MiB" if value >= 1024 else f"{value:.0f} KiB"


@styled
def units_side_by_side(runs: Sequence[Run], names: Sequence[str]) -> Figure | None:
    """The signal-to-noise ratio behind each unit, a line for each run."""
    if not any(run.units for run in runs):
        return None
    order = list(dict.fromkeys(unit["name"] for run in runs for unit in run.units))
    figure = new_figure(2.9)
    axes = figure.subplots()
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        found = {unit["name"]: unit["sqnr_db"] for unit in run.units}
        numbers = values_of(found.get(unit) for unit in order)
        axes.plot(order, numbers, marker="o", markersize=4, color=TERMS[i % len(TERMS)], label=name)
    axes.set_xticks(range(len(order)), [short(name, 20) for name in order], rotation=30, ha="right",
                    rotation_mode="anchor")  # fmt: skip
    axes.set_title("SQNR behind each unit, dB")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
