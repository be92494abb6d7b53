"""The rows of `benchmarks.methods` as tables and plots: methods.csv and time.csv -> docs/results.md, docs/img/*.png.

    python -m benchmarks.results

Means over seeds with the standard deviation. A gain is the mean of the differences between runs that share everything
but the setting in question (same seed, so same images, batches and masks), with its standard error.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import read
from benchmarks.methods import DEFAULTS, GRIDS, key, points

Row = dict[str, str]
Runs = dict[tuple[str, ...], Row]


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def gain(pairs: list[tuple[float, float]]) -> str:
    """Mean and standard error of second minus first."""
    differences = [b - a for a, b in pairs]
    error = f" ± {stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.2f}{error}"


def column(rows: Iterable[Row], name: str) -> list[float]:
    """The numbers in a column."""
    return [float(row[name]) for row in rows]


def seeds_of(runs: Runs, settings: dict[str, object]) -> dict[str, Row]:
    """seed -> row of every run with these settings."""
    at, wanted = list(DEFAULTS).index("seed"), key(settings)
    return {found[at]: row for found, row in runs.items() if found[:at] == wanted[:at]}


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table, or nothing without lines."""
    rule = ["---"] * len(head)
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *lines)] if lines else []


def grid_table(runs: Runs, name: str, labels: list[str], gains: bool = False) -> list[str]:
    """One line for each point of a grid that was run, nothing if that is one alone.

    `gains`: what it has before the grid's first point, over the seeds of both.
    """
    lines = []
    first: dict[str, Row] = {}
    for point in points(GRIDS[name]):
        found = seeds_of(runs, point)
        rows = list(found.values())
        if rows:
            first = first or found
            shown = [str(rows[0][label]) for label in labels]
            rates = [spread(column(rows, rate)) for rate in ("nearest_top1", "student_top1", "agreement")]
            if gains:
                pairs = [(first[seed], row) for seed, row in found.items() if seed in first and found is not first]
                rates += [
                    gain([(float(a[rate]), float(b[rate])) for a, b in pairs]) if pairs else ""
                    for rate in ("student_top1", "agreement")
                ]
            lines.append([*shown, *rates, str(len(rows))])
    head = [*labels, "nearest top-1", "calibrated top-1", "agreement", *(["gain", "gain in agreement"] * gains), "n"]
    return table(head, lines) if len(lines) > 1 else []


def gain_table(runs: Runs) -> list[str]:
    """Every setting that was run with and without the contrastive term, over the seeds that have both."""
    seed = list(DEFAULTS).index("seed")
    with_term = defaultdict(list)
    for found, row in runs.items():
        base = row | {"contrastive": "False", "critic": "{}"}
        if row["contrastive"] == "True" and key(base) in runs:
            with_term[found[:seed]].append((runs[key(base)], row))
    lines = []
    for pairs in with_term.values():
        row = pairs[0][1]
        shown = [row[name] for name in ("model", "bits", "method", "critic", "samples", "steps", "network_steps")]
        tops = [spread(column([pair[i] for pair in pairs], "student_top1")) for i in (0, 1)]
        gains = [gain([(float(a[name]), float(b[name])) for a, b in pairs]) for name in ("student_top1", "agreement")]
        lines.append([*shown, *tops, *gains, str(len(pairs))])
    head = ["model", "bits", "base", "critic", "images", "steps", "last epoch", "base top-1", "with the term"]
    return table([*head, "gain", "gain in agreement", "n"], sorted(lines))


def pooled_table(runs: Runs) -> list[str]:
    """The gain of the default term over all bases together, for each number of bits and images.

    Bases share a seed's images, so that their gains are averaged first; the error is that of the mean over seeds.
    """
    gains: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    bases: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in runs.values():
        base = row | {"contrastive": "False"}
        if row["contrastive"] == "True" and (row["critic"], row["options"]) == ("{}", "{}") and key(base) in runs:
            point = tuple(row[name] for name in ("model", "bits", "samples", "steps", "network_steps"))
            gains[point][row["seed"]].append(float(row["student_top1"]) - float(runs[key(base)]["student_top1"]))
            bases[point].add(row["method"])
    lines = []
    for point, seeds in gains.items():
        if len(bases[point]) > 1:
            averaged = gain([(0.0, mean(found)) for found in seeds.values()])
            lines.append([*point, ", ".join(sorted(bases[point])), averaged, str(len(seeds))])
    return table(["model", "bits", "images", "steps", "last epoch", "bases", "gain", "seeds"], sorted(lines))


def time_table(runs: Runs) -> list[str]:
    """Wall times of runs that had the machine for themselves."""
    lines = []
    for point in points(GRIDS["times"]):
        rows = [row for row in seeds_of(runs, point).values() if row["jobs"] == "1"]
        if rows:
            ratios = [
                f"{median(float(row['wall']) / float(row[f]) for row in rows):.0f}" for f in ("f_before", "f_between")
            ]
            seconds = [f"{median(column(rows, name)):.0f}" for name in ("wall", "calibration_seconds")]
            shown = [rows[0][name] for name in ("bits", "contrastive", "steps", "network_steps", "threads")]
            lines.append([*shown, *seconds, *ratios, f"{max(column(rows, 'peak_rss_mib')):.0f}", str(len(rows))])
    head = [
        "bits",
        "contrastive",
        "steps",
        "last epoch",
        "threads",
        "wall, s",
        "calibration, s",
        "wall / F before",
        "wall / F between",
    ]
    return table([*head, "peak RSS, MiB", "n"], lines)


def plot(runs: Runs, grid: str, x: str, label: str, path: Path, log: bool) -> bool:
    """Accuracy of a grid's points against a setting; a line with and without the term, and for each last epoch."""
    _, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    places, curves = set(), defaultdict(list)
    for point in points(GRIDS[grid]):
        rows = list(seeds_of(runs, point).values())
        if rows:
            tops, at = column(rows, "student_top1"), rows[0][x]
            found = (float(at) if log else at, mean(tops), stdev(tops) if len(tops) > 1 else 0.0)
            curves[rows[0]["contrastive"] == "True", point["network_steps"]].append(found)
    several = len({steps for _, steps in curves}) > 1
    for (contrastive, steps), curve in curves.items():
        if len(curve) > 1:
            last = f", {steps or 'default'} network_steps" if several else ""
            name = "qdrop + contrastive" if contrastive else "qdrop"
            axes.errorbar(*zip(*curve, strict=True), marker="o", capsize=3, label=name + last)
            places |= {at for at, *_ in curve}
    if log:
        axes.set_xscale("log")
        axes.set_xticks(sorted(places), [f"{place:.0f}" for place in sorted(places)])
        axes.minorticks_off()
    return finish_plot(axes, label, path)


def finish_plot(axes: Axes, label: str, path: Path) -> bool:
    """Label and save a plot of top-1; False, and no file, if nothing was drawn."""
    figure, drawn = axes.get_figure(), axes.has_data()
    assert isinstance(figure, Figure)
    axes.set(xlabel=label, ylabel="top-1, %")
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return drawn


def plot_times(timed: Runs, path: Path) -> bool:
    """Accuracy against wall time of runs that had the machine for themselves, at each number of steps."""
    _, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for contrastive in (False, True):
        curve = []
        for point in points(GRIDS["times"] | {"contrastive": [contrastive]}):
            rows = [row for row in seeds_of(timed, point).values() if row["jobs"] == "1"]
            if rows:
                tops = column(rows, "student_top1")
                error = stdev(tops) if len(tops) > 1 else 0.0
                curve.append((median(column(rows, "wall")), mean(tops), error, point["steps"]))
        if len(curve) > 1:
            seconds, tops, errors, steps = zip(*curve, strict=True)
            name = "qdrop + contrastive" if contrastive else "qdrop"
            axes.errorbar(seconds, tops, errors, marker="o", capsize=3, label=name)
            for x, y, count in zip(seconds, tops, steps, strict=True):
                axes.annotate(str(count), (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7)
    return finish_plot(axes, "wall time from start to end of Python, s (numbers: steps per unit)", path)


# Grid, setting on the x axis, its label, file, logarithmic or not.
PLOTS: list[tuple[str, str, str, str, bool]] = [
    ("steps", "steps", "steps per unit", "steps", True),
    ("sizes", "samples", "calibration images", "images", True),
    ("bits", "bits", "bits", "bits", False),
]


def document(runs: Runs, timed: Runs, folder: Path) -> str:
    """The text of results.md; the plots go to `folder`/img."""
    commits = sorted({row["commit"] for row in runs.values()})
    lines = [
        "# Results",
        "",
        "CIFAR-10 JPEGs, 4000 validation images, batch 32, rates by the step budget. Top-1 and agreement with the",
        "teacher in percent, mean ± standard deviation over n seeds; a seed draws other calibration images, batches",
        "and masks." + " Times are those of `benchmarks/time.csv`, with nothing beside the runs." * bool(timed),
        "",
        "Made by `python -m benchmarks.results` from `benchmarks/methods.csv`, to which `python -m benchmarks.methods`",
        f"adds rows. Commits: {', '.join(commits)}.",
    ]
    sections: list[tuple[str, list[str]]] = [
        (
            "Bits, by steps of the last epoch (default: 224)",
            grid_table(runs, "bits", ["bits", "method", "network_steps"]),
        ),
        ("Bits, as the paper has it: no corrections, no last epoch", grid_table(runs, "paper", ["bits", "method"])),
        ("Methods, a last epoch of 63 steps", grid_table(runs, "methods", ["bits", "method"])),
        (
            "Best preset: a last epoch of 1500 steps on changed images",
            grid_table(runs, "best", ["bits", "contrastive"]),
        ),
        ("Nothing learned", grid_table(runs, "unlearned", ["model", "bits", "options"])),
        (
            "Mixed precision with what W3A3 takes, first and last layer at 8 bits",
            grid_table(runs, "mixed", ["bits", "options"], gains=True),
        ),
        (
            "Mixed precision with the bit operations of W3A3, all layers",
            grid_table(runs, "mixed_ends", ["bits", "options"], gains=True),
        ),
        ("Steps per unit", grid_table(runs, "steps", ["bits", "steps", "network_steps", "contrastive"])),
        ("The contrastive term", gain_table(runs)),
        ("The contrastive term, all bases together", pooled_table(runs)),
        ("Calibration images", grid_table(runs, "sizes", ["bits", "samples", "contrastive"])),
        ("Time and memory", time_table(timed)),
    ]
    for title, body in sections:
        if body:
            lines += ["", f"## {title}", "", *body]
    for grid, x, label, name, log in PLOTS:
        if plot(runs, grid, x, label, folder / "img" / f"{name}.png", log):
            lines += ["", f"![top-1 against {label}](img/{name}.png)"]
    if plot_times(timed, folder / "img" / "time.png"):
        lines += ["", "![top-1 against wall time](img/time.png)"]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/methods.csv"))
    parser.add_argument("--times", type=Path, default=Path("benchmarks/time.csv"), help="rows made with --jobs 1")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of results.md and img/")
    args = parser.parse_args()
    rows = read(args.rows)
    if not rows:
        parser.error(f"{args.rows} has no rows. Run `python -m benchmarks.methods` first.")
    timed = {key(row): row for row in read(args.times)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.md").write_text(document({key(row): row for row in rows}, timed, args.out))


if __name__ == "__main__":
    main()
