"""What a page says: of one run, and of several side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from lightning_ptq.report import figures, histograms, unit_figures
from lightning_ptq.report.advice import advice
from lightning_ptq.report.page import DASH, Page, Picture, Section, Table, bytes_text, duration, flat, number, percent
from lightning_ptq.report.run import Run, chosen_layers, worst_layers
from lightning_ptq.report.style import DPI

# Layers whose histograms are drawn where none are named.
_WORST = 3


def page_of(run: Run, chosen: Sequence[str] = ()) -> tuple[Page, dict[str, Figure]]:
    """The page of one run, and its figures by name.

    Args:
        chosen: patterns of the names of layers whose activations and weights are drawn; the worst ones are anyway.

    Raises:
        PTQError: a pattern that matches no layer.
    """
    named = chosen_layers(run, chosen)
    inputs, weights = (_together(worst_layers(run, key, _WORST), named) for key in ("activations", "weights"))
    drawn = {
        "result": figures.result(run),
        "confusion": figures.confusion(run),
        "units": unit_figures.units(run),
        "losses": unit_figures.losses(run),
        "layers": unit_figures.layers(run),
        "activations": histograms.activations(run, inputs),
        "weights": histograms.weights(run, weights),
    }
    pictures = pictures_of(drawn)
    sections = [
        Section("Accuracy", "", pictures["result"]),
        Section(
            "Classes that changed",
            "Images of the validation by the teacher's class and the student's. Coloured is what is not the teacher's; "
            "of many classes the most frequent changes.",
            pictures["confusion"],
        ),
        Section(
            "Units",
            "Each unit's error before and after calibration, on the images that judge it. SQNR and the lower bound of "
            "the mutual information compare its output with the teacher's; flipped are weights that are not rounded to "
            "nearest.",
            pictures["units"],
            [unit_table(run)],
        ),
        Section("Loss", "Each term as it is weighted in the sum.", pictures["losses"]),
        Section(
            "Layers",
            "Size at the layer's bits, before a grey bar of float32; how far the signal is above quantization noise.",
            pictures["layers"],
            [layer_table(run)],
        ),
        Section(
            "Activations",
            "What the layers with the noisiest inputs read. Ticks on the axis are the values left after quantization.",
            pictures["activations"],
        ),
        Section(
            "Weights",
            "The layers with the noisiest weights, on their integer grid: 0 is zero, 1 a step of the quantizer. "
            "Channels with a zero point of their own reach differently far: all together have more values than one.",
            pictures["weights"],
        ),
        Section(
            "Stays in floating point",
            "",
            [],
            [Table(["what", "why"], [[op["name"], op["reason"]] for op in run.record.get("floats", [])])],
        ),
        Section("What the result depends on", "", [], dependence(run)),
    ]
    return Page(title_of(run), subtitle_of(run), facts(run), [("What to try next", advice(run))], sections), _there(
        drawn
    )


def comparison_of(runs: Sequence[Run]) -> tuple[Page, dict[str, Figure]]:
    """The page of several runs side by side, and its figures by name."""
    names = unique_names(runs)
    drawn = {"results": figures.side_by_side(runs, names), "units": unit_figures.units_side_by_side(runs, names)}
    pictures = pictures_of(drawn)
    told = [_known(run) | flat(_settings(run)) for run in runs]
    keys = list(dict.fromkeys(key for settings in told for key in settings))
    differing = [key for key in keys if len({settings.get(key) for settings in told}) > 1]
    rows = [[key, *(settings.get(key, DASH) for settings in told)] for key in differing]
    sections = [
        Section("Accuracy", "", pictures["results"], [run_table(runs, names)]),
        Section("Units", "", pictures["units"]),
        Section("In what they differ", "", [], [Table(["setting", *names], rows)]),
    ]
    best = max(zip(runs, names, strict=True), key=lambda pair: _score(pair[0]))
    found = [
        ("runs", str(len(runs))),
        ("best", best[1]),
        *((("its top-1", percent(best[0].summary["student_top1"])),) if best[0].summary["student_top1"] else ()),
    ]
    models = " · ".join(dict.fromkeys(run.summary["model"] for run in runs))
    told_advice = [(f"What to try next on {name}", advice(run)) for run, name in zip(runs, names, strict=True)]
    page = Page(f"{len(runs)} runs side by side", models, found, told_advice, sections)
    return page, _there(drawn)


def _there(drawn: dict[str, Figure | None]) -> dict[str, Figure]:
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _together(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*first, *(layer for layer in second if layer not in first)]


_ALT = {
    "result": "Bars: teacher, rounded to nearest and calibrated",
    "results": "Bars: each run's result, calibrated and rounded to nearest",
    "confusion": "Classes of the teacher's against classes of the student's",
    "units": "What calibration did to each unit; the numbers are in the table",
    "losses": "Loss terms over the steps",
    "layers": "Size, bits and signal-to-noise ratio of each layer; the numbers are in the table",
    "activations": "Histograms of activations with their ranges",
    "weights": "Histograms of weights on their grid",
}


def pictures_of(drawn: dict[str, Figure | None]) -> dict[str, list[Picture]]:
    """Each figure as PNG, in a list of one, or of none where there is no figure."""
    return {name: [] if figure is None else [Picture(name, png(figure), _ALT[name])] for name, figure in drawn.items()}


def png(figure: Figure) -> bytes:
    """The figure as a PNG that says nothing about the software that wrote it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def title_of(run: Run) -> str:
    """Model, bits and method."""
    part = run.summary.get("part")
    return f"{run.summary['model']}{f' ({part})' if part else ''} · {run.bits} · {run.method}"


def subtitle_of(run: Run) -> str:
    """Where and how it ran."""
    s = run.summary
    state = "" if s["complete"] else f"not finished, {run.done} · "
    kept = "" if s["accepted"] or not s["units"] else "put back to rounding to nearest · "
    return (
        f"{state}{kept}{s['calibration_samples']:,} calibration images · {s['steps_per_unit']:,} steps a unit · "
        f"seed {s['seed']} · {run.name}"
    )


def facts(run: Run) -> list[tuple[str, str]]:
    """The numbers that count, large on top."""
    s = run.summary
    found: list[tuple[str, str]] = []
    if s["student_top1"] is not None:
        found += [("top-1, calibrated", percent(s["student_top1"])), ("top-1, teacher", percent(s["teacher_top1"]))]
    if s["teacher_agreement"] is not None:
        found.append(("agree with the teacher", percent(s["teacher_agreement"])))
    elif s.get("student_sqnr_db") is not None:
        found.append(("output SQNR", f"{s['student_sqnr_db']:.1f} dB"))
    if run.layers:
        size = sum(layer["weight_bytes"] for layer in run.layers)
        full = sum(4 * layer["weights"] for layer in run.layers)
        found.append((f"of weights, {100 * size / full:.0f} % of float32", bytes_text(size)))
    found.append(("whole run", duration(s["wall_seconds"]["total"])))
    return found


def unit_table(run: Run) -> Table:
    """The units' reports."""
    columns = ["unit", "error before", "after", "SQNR, dB", "MI bound, nats", "flipped, %", "seconds", "result"]
    rows = [
        [
            unit["name"],
            number(unit["mse_before"]),
            number(unit["mse_after"]),
            number(unit["sqnr_db"]),
            number(unit["mi_lower_bound_nats"]),
            number(100 * unit["flipped_fraction"]),
            number(unit["seconds"]),
            "accepted" if unit["accepted"] else "put back",
        ]
        for unit in run.summary["units"]
    ]
    return Table(columns, rows, "All numbers of the units")


def layer_table(run: Run) -> Table:
    """The layers' bits, sizes and signal-to-noise ratios."""
    columns = ["layer", "kind", "unit", "W bits", "A bits", "weights", "KiB", "W SQNR, dB", "A SQNR, dB", "flipped, %",
               "A clipped, %"]  # fmt: skip
    rows = []
    for layer in run.layers:
        read = run.reads(layer)
        rows.append(
            [
                layer["name"],
                layer["kind"],
                layer["unit"],
                str(layer["weight_bits"]),
                str(layer["act_bits"]),
                number(layer["weights"]),
                number(layer["weight_bytes"] / 1024),
                number(layer["grid"]["sqnr_db"]),
                number(None if read is None else read["sqnr_db"]),
                number(100 * layer["grid"]["flipped_fraction"]),
                number(None if read is None else 100 * read["clipped_fraction"]),
            ]
        )
    return Table(columns, rows, "All numbers of the layers")


def run_table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """A row for each run."""
    columns = ["run", "method", "bits", "top-1 %", "nearest %", "agreement %", "weights", "time"]
    rows = [
        [
            name,
            run.method,
            run.bits,
            *(percent(run.summary[key]) for key in ("student_top1", "nearest_top1", "teacher_agreement")),
            bytes_text(sum(layer["weight_bytes"] for layer in run.layers)) if run.layers else DASH,
            duration(run.summary["wall_seconds"]["total"]),
        ]
        for run, name in zip(runs, names, strict=True)
    ]
    return Table(columns, rows)


def dependence(run: Run) -> list[Table]:
    """Fingerprint, environment and settings."""
    s = run.summary
    clocks = {f"seconds of {key}": number(value) for key, value in s["wall_seconds"].items()}
    memory = {"peak memory": bytes_text(s["peak_rss_bytes"]), "of the device": bytes_text(s["peak_device_bytes"])}
    parts = [
        (_known(run), "Fingerprint and environment"),
        (clocks | memory, "Time and memory"),
        (flat(_settings(run)), "All settings"),
    ]
    return [Table(["", ""], [[key, value] for key, value in part.items()], fold) for part, fold in parts]


def _known(run: Run) -> dict[str, str]:
    """What identifies weights and images, and where it ran."""
    found = run.summary.get("digests", {})
    named = (("weights", "model"), ("images", "images"))
    digests = {f"digest of {name}": str(found[key]) for name, key in named if key in found}
    return digests | flat(run.summary.get("environment", {}))


def _settings(run: Run) -> dict[str, Any]:
    s = run.summary
    images = {"calibration_samples": s["calibration_samples"], "model": s["model"]}
    settings: dict[str, Any] = s["settings"]
    return images | settings | {"quant": s.get("quant", {}), "trainer": s.get("trainer", {})}


def _score(run: Run) -> float:
    """What the best of several runs has most of."""
    s = run.summary
    found = [s.get(key) for key in ("student_top1", "teacher_agreement", "student_sqnr_db")]
    return next((value for value in found if value is not None), float("-inf"))


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Names of the runs' folders, with as much of what is above them as tells them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    while min(map(len, paths)) > 1 and len({path[-1] for path in paths}) == 1 and len(set(paths)) == len(paths):
        paths = [path[:-1] for path in paths]
    longest = max(map(len, paths))
    for depth in range(1, longest + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(path[-1:])} ({i + 1})" for i, path in enumerate(paths)]
