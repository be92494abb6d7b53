"""What a calibration costs as one thing grows: `python -m benchmarks.scale`, with nothing beside it.

Images, steps of each unit, depth, pixels of a side, and processes; all else stays: ResNet-20 (untrained), 256 images of
32 pixels, 50 steps, batches of 32, one thread for each process. The points of one line take turns, each run in a
process of its own. Seconds are those of `summary.json`, ranges and calibration. Along a line the table has the exponent
p of cost ~ quantity^p between neighbours (1: linear; pixels count by their area); for processes, which draw a batch
each, the seconds for as many images as one process sees. Rows go to benchmarks/scale.csv, the plot to
docs/img/scale.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_ptq as ptq
from benchmarks.census import settle, smooth_images
from benchmarks.common import commit, in_process
from lightning_ptq.models import CifarResNet

DEFAULTS = {"images": 256, "steps": 50, "depth": 3, "pixels": 32, "processes": 1}
LINES = {
    "images": (128, 256, 512, 1024),
    "steps": (25, 50, 100, 200),
    "depth": (1, 2, 4, 8),  # blocks of each of three stages: 8, 14, 26 and 50 layers
    "pixels": (16, 32, 64),
    "processes": (1, 2),
}
COLUMNS = ("line", "value", "seconds", "repeats", "commit")


def run(settings: dict[str, int]) -> float:
    """Seconds of one calibration in this process and those that it starts."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = smooth_images(settings["images"], (3, settings["pixels"], settings["pixels"]))
    model = CifarResNet((settings["depth"],) * 3).eval()
    settle(model, (3, settings["pixels"], settings["pixels"]))
    steps, processes = settings["steps"], settings["processes"]
    module = ptq.PTQModule(model, ptq.QuantConfig(4, 4), steps_per_unit=steps, seed=0, report=False)
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            accelerator="cpu",
            devices=processes,
            strategy="ddp_fork" if processes > 1 else "auto",
            use_distributed_sampler=False,
            max_epochs=-1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, datamodule=ptq.CalibrationDataModule.from_loaders([images], calibration_samples=len(images)))
        seconds = json.loads((Path(folder) / "summary.json").read_text())["wall_seconds"]
    return float(seconds["ranges"] + seconds["calibration"])


def exponent(line: str, before: dict[str, Any], row: dict[str, Any]) -> float:
    """p of seconds ~ quantity^p between two rows."""
    growth = (row["value"] / before["value"]) ** (2 if line == "pixels" else 1)
    return math.log(row["seconds"] / before["seconds"]) / math.log(growth)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each line, both axes logarithmic, with the slope that is linear."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in LINES if line != "processes" and any(row["line"] == line for row in rows)]
    figure, axes = plt.subplots(1, len(lines), figsize=(3.1 * len(lines), 3), squeeze=False, layout="constrained")
    for axis, line in zip(axes[0], lines, strict=True):
        points = [
            (row["value"] ** (2 if line == "pixels" else 1), row["seconds"]) for row in rows if row["line"] == line
        ]
        x, y = zip(*points, strict=True)
        axis.loglog(x, y, "o-", color="tab:blue", label="measured")
        axis.loglog(x, [y[-1] * a / x[-1] for a in x], "--", color="tab:gray", label="linear")
        axis.set_xticks(x, [str(row["value"]) for row in rows if row["line"] == line])
        axis.set_yticks([y[0], y[-1]], [f"{y[0]:.1f}", f"{y[-1]:.1f}"])
        axis.minorticks_off()
        axis.set_xlabel({"depth": "blocks of each stage", "steps": "steps of each unit"}.get(line, line))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds")
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", nargs="+", choices=list(LINES), default=list(LINES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/scale.csv"))
    parser.add_argument("--plot", type=Path, default=Path("docs/img/scale.png"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(json.loads(args.one))))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[dict[str, Any]] = []
    print(f"{'line':<10} {'value':>6} {'seconds':>8} {'exponent':>9}")
    for line in args.lines:
        found: dict[int, list[float]] = {value: [] for value in LINES[line]}
        for _ in range(args.repeats):
            for value, seconds in found.items():
                seconds.append(in_process("scale", "--one", json.dumps(DEFAULTS | {line: value})))
        for value, seconds in found.items():
            # Two processes take as many steps, so see twice as many images.
            middle = statistics.median(seconds) / (value if line == "processes" else 1)
            row = {
                "line": line,
                "value": value,
                "seconds": round(middle, 2),
                "repeats": args.repeats,
                "commit": commit(),
            }
            told = f"{exponent(line, rows[-1], row):>9.2f}" if rows and rows[-1]["line"] == line else ""
            rows.append(row)
            print(f"{line:<10} {value:>6} {row['seconds']:>8.2f} {told}", flush=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    if set(args.lines) - {"processes"}:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
