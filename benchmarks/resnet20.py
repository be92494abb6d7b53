"""Accuracy, wall time and peak memory of every method on the trained CIFAR ResNet-20, over seeds.

    python -m benchmarks.resnet20 --grid bits methods --seeds 0 1 2      # runs what the CSV lacks, then prints tables
    python -m benchmarks.resnet20 --grid steps --threads 1

Each run is a process of its own, so that its peak memory and its wall time from start to end are its own. A seed draws
other calibration images, batches and masks. F, one plain forward pass, is measured in the run's process and left out
of its wall time: before the fit, where the process is as plain as that of the code it is compared with, and after it,
where `lightning_ptq.allocator` has made forward passes faster.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks.common import DEFAULT_ROOT, commit, seconds_of_forward, trained_resnet20

GRIDS: dict[str, list[dict[str, Any]]] = {
    "bits": [{"bits": bits} for bits in ("w4a4", "w3a3", "w2a4", "w2a2")],
    # As their papers have them: unit by unit, without the whole-network epoch.
    "units": [{"bits": bits, "network_steps": 0} for bits in ("w4a4", "w3a3", "w2a4", "w2a2")],
    "methods": [
        {"bits": "w2a4", "method": method, "network_steps": 0} for method in ("nearest", "adaround", "brecq", "qdrop")
    ],
    "steps": [{"bits": "w2a2", "steps": steps} for steps in (100, 250, 500, 1000, 2000)],
    "contrastive": [{"bits": "w2a2", "contrastive": on} for on in (False, True)],
    # Twice as many steps of the last epoch as by default.
    "long": [{"bits": bits, "network_steps": 250} for bits in ("w4a4", "w3a3", "w2a4", "w2a2")],
    "time": [{"bits": "w2a2", "network_steps": steps} for steps in (0, 125)],
}
DEFAULTS = {
    "bits": "w2a2",
    "method": "qdrop",
    "contrastive": False,
    "steps": 500,
    "network_steps": None,  # a quarter of `steps`, as is the library's default
    "samples": 1024,
    "seed": 0,
}
RESULTS = (
    "nearest_top1",
    "student_top1",
    "teacher_agreement",
    "wall",
    "f_before",
    "f_after",
    "peak_rss_mib",
    "threads",
    "commit",
)


def run_one(settings: dict[str, Any], root: Path, threads: int) -> dict[str, Any]:
    """One calibration in this process; the wall time counts from the parent's start of the process."""
    import lightning as L
    import torch

    import lightning_ptq as ptq

    torch.set_num_threads(threads)
    bits = settings["bits"]
    module = ptq.PTQModule(
        trained_resnet20(root),
        ptq.QuantConfig(weight_bits=int(bits[1]), act_bits=int(bits[3])),
        settings["method"],
        contrastive=settings["contrastive"],
        steps_per_unit=settings["steps"],
        network_steps=settings["network_steps"],
        seed=settings["seed"],
    )
    data = ptq.ImageFolderData(
        str(root), resize=None, crop=None, calibration_samples=settings["samples"], seed=settings["seed"]
    )
    data.setup("fit")
    paused = time.time()
    f_before = seconds_of_forward(trained_resnet20(root), data.calibration_images())
    paused = time.time() - paused
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            accelerator="cpu", max_epochs=-1, logger=False, default_root_dir=folder, enable_progress_bar=False
        ).fit(module, datamodule=data)
        summary = json.loads((Path(folder) / "summary.json").read_text())
    wall = time.time() - float(os.environ["BENCHMARK_START"]) - paused
    f_after = seconds_of_forward(trained_resnet20(root), data.calibration_images())
    return {
        **{key: summary[key] for key in ("nearest_top1", "student_top1", "teacher_agreement")},
        "wall": round(wall, 1),
        "f_before": round(f_before, 3),
        "f_after": round(f_after, 3),
        "peak_rss_mib": round(summary["peak_rss_bytes"] / 2**20),
        "threads": threads,
        "commit": commit(),
    }


def resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run, with the number of whole-network steps spelt out."""
    settings = DEFAULTS | settings
    steps = settings["network_steps"]
    return settings | {"network_steps": -(-settings["steps"] // 4) if steps is None else steps}


def in_process(arguments: list[str], root: Path, threads: int) -> Any:
    """What this program prints, as JSON, when it is run with `arguments`."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.resnet20", "--root", str(root)]
    command += ["--threads", str(threads), *arguments]
    environment = os.environ | {"BENCHMARK_START": str(time.time())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_missing(wanted: list[dict[str, Any]], out: Path, root: Path, threads: int) -> list[dict[str, str]]:
    """Append to the CSV every wanted run that it lacks; returns all its rows."""
    rows = list(csv.DictReader(out.open())) if out.exists() else []
    known = {tuple(row[key] for key in DEFAULTS) for row in rows}
    for settings in wanted:
        if tuple(str(settings[key]) for key in DEFAULTS) in known:
            continue
        result = in_process(["--one", json.dumps(settings)], root, threads)
        row = settings | result
        print(row, flush=True)
        new = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*DEFAULTS, *RESULTS])
            if new:
                writer.writeheader()
            writer.writerow(row)
        rows.append({key: str(value) for key, value in row.items()})
    return rows


def print_table(rows: list[dict[str, str]], grid: list[dict[str, Any]], with_time: bool) -> None:
    """Markdown: one line for each point of the grid, over the seeds.

    `with_time` adds the ratio of wall time to F: it means something only if nothing else ran on the machine.
    """
    time_columns = " wall, s | wall / F before | wall / F after | peak RSS |" if with_time else ""
    print(f"\n| bits | method | steps | nearest | calibrated top-1 | agreement |{time_columns} n |")
    print("|---|---|---|---|---|---|" + "---|" * (5 if with_time else 1))
    for point in grid:
        settings = resolved(point)
        found = [row for row in rows if all(row[key] == str(settings[key]) for key in DEFAULTS if key != "seed")]
        if with_time:
            found = [row for row in found if row["f_before"]]  # older rows have none
        if not found:
            continue

        def column(name: str, found: list[dict[str, str]] = found) -> list[float]:
            return [float(row[name]) for row in found]

        def spread(name: str, values: Any = column) -> str:
            numbers = values(name)
            return f"{mean(numbers):.2f} ± {stdev(numbers):.2f}" if len(numbers) > 1 else f"{numbers[0]:.2f}"

        timed = ""
        if with_time:
            walls = column("wall")
            ratios = [median(w / f for w, f in zip(walls, column(f), strict=True)) for f in ("f_before", "f_after")]
            timed = f" {median(walls):.0f} | {ratios[0]:.0f} | {ratios[1]:.0f} "
            timed += f"| {max(column('peak_rss_mib')):.0f} MiB |"
        method = settings["method"] + (" + contrastive" if settings["contrastive"] else "")
        method += f" + whole network, {settings['network_steps']}" if settings["network_steps"] else ""
        print(
            f"| {settings['bits'].upper()} | {method} | {settings['steps']} "
            f"| {spread('nearest_top1')} | {spread('student_top1')} | {spread('teacher_agreement')} "
            f"|{timed} {len(found)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/, val/ and teachers/")
    parser.add_argument("--grid", nargs="+", choices=sorted(GRIDS), default=["bits"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/resnet20.csv"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(json.loads(args.one), args.root, args.threads)))
        return
    for name in args.grid:
        wanted = [resolved(point | {"seed": seed}) for point in GRIDS[name] for seed in args.seeds]
        rows = run_missing(wanted, args.out, args.root, args.threads)
        print_table(rows, GRIDS[name], with_time=name == "time")


if __name__ == "__main__":
    main()
