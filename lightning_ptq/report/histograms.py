"""Histograms of activations and weights: each function gives a Figure, or None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ptq.report.run import Run
from lightning_ptq.report.style import BLUE, GREY, ORANGE, new_figure, plain_log, short, styled


@styled
def activations(run: Run, chosen: Sequence[dict[str, Any]]) -> Figure | None:
    """What the chosen layers read, before it is quantized, with the range at first and the one that was learned."""
    tensors = {layer["reads"]: run.activations[layer["reads"]] for layer in chosen if run.reads(layer) is not None}
    if not tensors:
        return None
    figure, panels = _panels(len(tensors))
    for axes, entry in zip(panels, tensors.values(), strict=False):
        _activation(axes, entry)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _activation(axes: Axes, entry: dict[str, Any]) -> None:
    counts = np.array(entry["counts"], dtype=float)
    edges = entry["start"] + entry["width"] * np.arange(len(counts) + 1)
    (low, high), initial = entry["range"], entry["initial_range"]
    axes.stairs(np.maximum(counts, 0.5), edges, fill=True, color=GREY, alpha=0.75, baseline=0.5, label="values, float")
    axes.axvspan(low, high, color=BLUE, alpha=0.13, linewidth=0, label="range, calibrated")
    for end in (low, high):
        axes.axvline(end, color=BLUE, linewidth=1.4)
    for end in initial:
        axes.axvline(end, color=ORANGE, linewidth=1.4, linestyle=(0, (3, 2)))
    axes.plot([], [], color=ORANGE, linestyle=(0, (3, 2)), label="range, at first")
    if 0 < entry["levels"] <= 16:
        axes.plot(np.linspace(low, high, entry["levels"]), [0.5] * entry["levels"], "|", color=BLUE, markersize=11,
                  markeredgewidth=1.6, clip_on=False, zorder=5)  # fmt: skip
    # A tail far beyond the range would squeeze all else to a line.
    wide = 1.6 * max(high - low, initial[1] - initial[0])
    middle = (low + high) / 2
    left, right = (
        max(min(edges[0], low, initial[0]), middle - wide),
        min(max(edges[-1], high, initial[1]), middle + wide),
    )
    axes.set_xlim(left - 0.03 * (right - left), right + 0.03 * (right - left))
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    axes.set_ylim(0.5, counts.max() * 2)
    axes.set_title(f"read by {_readers(entry)}")
    axes.set_xlabel(f"{entry['bits']} bits, {_db(entry['sqnr_db'])}, {100 * entry['clipped_fraction']:.2g} % clipped")
    axes.grid(visible=False)


def _readers(entry: dict[str, Any]) -> str:
    names = entry["read_by"]
    return "a product" if not names else short(names[0], 34) + (f" and {len(names) - 1} more" if names[1:] else "")


def _db(value: float | None) -> str:
    return "no noise" if value is None else f"{value:.1f} dB"


@styled
def weights(run: Run, chosen: Sequence[dict[str, Any]]) -> Figure | None:
    """The chosen layers' weights on their integer grid, before quantization, rounded to nearest and calibrated."""
    if not chosen:
        return None
    figure, panels = _panels(len(chosen))
    for axes, layer in zip(panels, chosen, strict=False):
        _weight(axes, layer)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _weight(axes: Axes, layer: dict[str, Any]) -> None:
    grid, fine = layer["grid"], layer["grid"]["bars_per_step"]
    total = max(layer["weights"], 1)
    floats = np.array(grid["float"], dtype=float) / total * fine * 100
    edges = grid["start"] + np.arange(len(floats) + 1) / fine
    axes.stairs(floats, edges, fill=True, color=GREY, alpha=0.45, label="float, share in each step")
    integers = grid["first"] + np.arange(len(grid["nearest"]))
    few = len(integers) <= 24
    for key, colour, side in (("nearest", ORANGE, -1), ("calibrated", BLUE, 1)):
        shares = np.array(grid[key], dtype=float) / total * 100
        if few:
            axes.bar(integers + side * 0.17, shares, width=0.3, color=colour, label=key)
        else:
            axes.plot(integers, shares, color=colour, linewidth=1.1, label=key)
    if few:
        axes.set_xticks(integers)
    axes.set_title(short(layer["name"], 34))
    flipped = 100 * grid["flipped_fraction"]
    axes.set_xlabel(f"{layer['weight_bits']} bits, {_db(grid['sqnr_db'])}, {flipped:.2g} % flipped")
    axes.set_ylabel("% of weights")
    axes.grid(axis="x", visible=False)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = new_figure(0.4 + 2.3 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels
