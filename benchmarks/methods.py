"""Accuracy, time and memory of calibration methods on the shared CIFAR-10 images: one process and one CSV row a run.

    python -m benchmarks.methods --grid bits methods              # runs what benchmarks/methods.csv lacks
    python -m benchmarks.methods --grid time --seeds 0 1 --out benchmarks/time.csv    # with nothing beside it
    python -m benchmarks.methods --grid contrastive --bits w2a2 --seeds 0 1 2 3 4 --jobs 2
    python -m benchmarks.results                                  # the CSV -> docs/results.md and its plots

A grid is the product of its settings' values; a setting given on the command line takes the place of the grid's. Each
run is a process of its own, so that its peak memory and its wall time from start to end are its own. A seed draws other
calibration images, batches and masks. F, one plain forward pass, is measured in the run's process and left out of its
times: before the fit, where the process is as plain as that of the code it is compared with, and between its units,
where `lightning_ptq.allocator` has made forward passes faster. Times mean something in rows with one job only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import DEFAULT_ROOT, Yardstick, append, calibrate, commit, read, trained
from lightning_ptq.methods import default_network_steps

BITS = ["w4a4", "w3a3", "w2a4", "w2a2"]
BASES = ["adaround", "brecq", "qdrop", "pdquant"]
Grid = dict[str, list[Any]]

# Where the last epoch has 63 steps, that was the default when most rows were measured.
GRIDS: dict[str, Grid] = {
    "bits": {"bits": BITS, "network_steps": [None, 63]},
    # As its paper has it: unit by unit, without the whole-network epoch, corrections of weights and an end of the drop.
    "paper": {"bits": BITS, "network_steps": [0], "options": [{"corrections": False, "drop_until": 1.0}]},
    "methods": {"bits": ["w2a4"], "method": ["adaround", "brecq", "qdrop"], "network_steps": [63]},
    "steps": {"steps": [100, 250, 500, 1000, 2000], "contrastive": [False, True]},
    "contrastive": {
        "bits": BITS,
        "method": BASES,
        "contrastive": [False, True],
        "samples": [1024, 128],
        "network_steps": [63],
    },
    "sizes": {"samples": [64, 128, 256, 1024], "contrastive": [False, True], "network_steps": [63]},
    # Nothing but the term: so large a weight leaves the reconstruction no say.
    "alone": {"contrastive": [True], "critic": [{"rho": 1000.0}], "network_steps": [63]},
    "depthwise": {"model": ["mobilenetv2"], "bits": ["w4a4"], "contrastive": [False, True], "network_steps": [63]},
    "best": {
        "bits": BITS,
        "contrastive": [False, True],
        "network_steps": [1500],
        "options": [{"augment": {"flip": True, "shift": 2}}],
    },
    # Bits chosen for each layer but the first and the last; "w3a3" sets the budget's yardstick only.
    "mixed": {
        "bits": ["w3a3"],
        "options": [
            {},
            {"quant": {"average_bits": 3.0}},
            {"quant": {"average_bits": 3.0, "budget": "memory"}},
            {"quant": {"average_bits": 3.0, "budget": "size"}},
        ],
    },
    # Those of the first and the last as well: 3 bits everywhere, and 3 on average.
    "mixed_ends": {
        "bits": ["w3a3"],
        "options": [{"quant": {"edges": "same"}}, {"quant": {"edges": "same", "average_bits": 3.0}}],
    },
    # Nothing is learned: bias correction and cross-layer equalisation. A row has plain rounding to nearest as well.
    "unlearned": {
        "model": ["resnet20", "mobilenetv2"],
        "bits": BITS,
        "method": ["nearest"],
        "options": [{"corrections": True}, {"quant": {"pairs": "smooth"}}],
    },
    "time": {"contrastive": [False, True]},
    "times": {"steps": [25, 50, 100, 250, 500], "contrastive": [False, True]},
}
DEFAULTS: dict[str, Any] = {
    "model": "resnet20",
    "bits": "w2a2",
    "method": "qdrop",
    "contrastive": False,
    "critic": {},  # fields of `ContrastiveConfig` that differ from its defaults
    "options": {},  # further arguments of `PTQModule`, and of its `QuantConfig` below "quant"
    "samples": 1024,
    "steps": 500,
    "network_steps": None,  # the library's default
    "seed": 0,
}
RESULTS = (
    "teacher_top1",
    "nearest_top1",
    "student_top1",
    "agreement",
    "mi_nats",
    "wall",
    "ranges_seconds",
    "calibration_seconds",
    "validation_seconds",
    "f_before",
    "f_between",
    "peak_rss_mib",
    "threads",
    "jobs",
    "commit",
)


def run_one(settings: dict[str, Any], root: Path, threads: int) -> dict[str, Any]:
    """One calibration in this process; the wall time counts from the parent's start of the process."""
    import torch
    from lightning.pytorch.callbacks import LambdaCallback

    import lightning_ptq as ptq

    torch.set_num_threads(threads)
    options = dict(settings["options"])
    if "augment" in options:
        options["augment"] = ptq.Augmentation(**options["augment"])
    bits, samples, seed = settings["bits"], settings["samples"], settings["seed"]
    module = ptq.PTQModule(
        trained(settings["model"], root),
        ptq.QuantConfig(weight_bits=int(bits[1]), act_bits=int(bits[3]), **options.pop("quant", {})),
        settings["method"],
        contrastive=settings["contrastive"],
        critic=ptq.ContrastiveConfig(**settings["critic"]),
        steps_per_unit=settings["steps"],
        network_steps=settings["network_steps"],
        seed=seed,
        report=False,
        **{"rounding_weight": 0.01, **options},  # the papers', and the default when most rows were measured
    )
    data = ptq.ImageFolderData(str(root), resize=None, crop=None, calibration_samples=samples, seed=seed)
    data.setup("fit")
    before, between = (Yardstick(trained(settings["model"], root), data.calibration_images()) for _ in range(2))
    before.measure(5)
    with tempfile.TemporaryDirectory() as folder:
        calibrate(module, data, folder, LambdaCallback(on_train_epoch_start=lambda *_: between.measure()))
        summary = json.loads((Path(folder) / "summary.json").read_text())
    wall = time.time() - float(os.environ["BENCHMARK_START"]) - sum(before.seconds + between.seconds)
    return {
        **{key: round(summary[key], 3) for key in ("teacher_top1", "nearest_top1", "student_top1")},
        "agreement": round(summary["teacher_agreement"], 3),
        "mi_nats": round(mean(unit["mi_lower_bound_nats"] for unit in summary["units"]), 4),
        "wall": round(wall, 1),
        **{f"{key}_seconds": summary["wall_seconds"][key] for key in ("ranges", "calibration", "validation")},
        "f_before": round(before.f, 3),
        "f_between": round(between.f, 3),
        "peak_rss_mib": round(summary["peak_rss_bytes"] / 2**20),
        "threads": threads,
        "commit": commit(),
    }


def points(grid: Grid) -> list[dict[str, Any]]:
    """Every combination of the grid's values, with all other settings at their defaults."""
    combinations = itertools.product(*grid.values())
    return [DEFAULTS | dict(zip(grid, values, strict=True)) for values in combinations]


def key(settings: dict[str, Any]) -> tuple[str, ...]:
    """What tells one run from another, as the CSV writes it; the default of `network_steps` is spelt out."""
    if settings["network_steps"] in (None, ""):
        steps = 0 if settings["method"] == "nearest" else default_network_steps(int(settings["steps"]))
        settings = settings | {"network_steps": steps}
    return tuple(
        json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
        for value in (settings[name] for name in DEFAULTS)
    )


def in_process(settings: dict[str, Any], root: Path, threads: int) -> dict[str, Any] | None:
    """The results of one run in a process of its own; None, and its error on stderr, if it failed."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.methods", "--root", str(root)]
    command += ["--threads", str(threads), "--one", json.dumps(settings)]
    environment = os.environ | {"BENCHMARK_START": str(time.time()), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{settings}\n{done.stderr}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def run_missing(wanted: list[dict[str, Any]], out: Path, root: Path, threads: int, jobs: int) -> int:
    """Append to the CSV every wanted run that it lacks, `jobs` at a time; returns how many failed."""
    known = {key(row) for row in read(out)}
    # By key: grids may share points.
    missing = list({key(settings): settings for settings in wanted if key(settings) not in known}.values())
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(in_process, settings, root, threads): settings for settings in missing}
        for future in as_completed(running):
            result = future.result()
            if result is None:
                failed += 1
                continue
            row = dict(zip(DEFAULTS, key(running[future]), strict=True)) | result | {"jobs": jobs}
            print(json.dumps(row), flush=True)
            append(out, (*DEFAULTS, *RESULTS), [row])
    return failed


def _value(text: str) -> Any:
    """A setting's value on the command line: JSON where it is any, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/, val/ and teachers/")
    parser.add_argument("--grid", nargs="+", choices=sorted(GRIDS), help="named products of settings")
    for name in DEFAULTS:
        parser.add_argument(f"--{name}{'s' * (name == 'seed')}", dest=name, nargs="+", type=_value)
    parser.add_argument("--threads", type=int, help="of each run; by default the cores over the jobs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/methods.csv"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    if args.one:
        print(json.dumps(run_one(json.loads(args.one), args.root, threads)))
        return
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    given.setdefault("seed", [0, 1, 2])
    wanted = [point for name in args.grid or [None] for point in points(GRIDS.get(name, {}) | given)]
    sys.exit(run_missing(wanted, args.out, args.root, threads, args.jobs) > 0)


if __name__ == "__main__":
    main()
