"""Seconds and memory of whole calibrations: `python -m benchmarks.speed --root FOLDER --jobs cifar --repeats 3`.

A job is a network, images, bits and steps; its variants take turns, each run in a process of its own, so that peaks of
memory are its own and a machine that slows down slows all of them. Seconds are those of `summary.json`: ranges and
calibration, without imports and validation. F is one float32 forward pass of the network over the job's images in
batches of 32, the median of passes before the fit and between its epochs: what a machine is worth. A run becomes a line
of benchmarks/speed.json; the table has medians and, of each variant over the job's first one, the median of the ratios
of neighbouring runs. On a GPU: `--accelerator gpu`, where the rate of matrix products in use is printed too.

    python -m benchmarks.speed --jobs resnet18 --repeats 1
    python -m benchmarks.speed --jobs resnet18-20k resnet50-20k --accelerator gpu --repeats 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_ptq as ptq
from benchmarks.census import random_model
from benchmarks.common import DEFAULT_ROOT, Yardstick, commit, in_process, trained
from benchmarks.eight_bits import crops, settle
from lightning_ptq import kernels

# Arguments of `PTQModule` that a variant has beyond the job's; "operations" goes without compiled kernels too.
VARIANTS: dict[str, dict[str, Any]] = {
    "qdrop": {},
    "bf16": {},
    "tuned": {},
    "unrecorded": {"record_steps": False},
    "units": {"network_steps": 0},
    "operations": {"record_steps": False, "steps_per_batch": 1},
    "contrastive": {"contrastive": True},
    "paper": {"corrections": False, "network_steps": 0, "drop_until": 1.0},
}
# The Trainer's, where they are not the default.
TRAINER: dict[str, dict[str, Any]] = {"bf16": {"precision": "bf16-mixed"}, "tuned": {"benchmark": True}}
# name -> (network, pixels, images, bits, steps for each unit)
JOBS: dict[str, tuple[str, int, int, tuple[int, int], int]] = {
    "cifar": ("resnet20", 32, 1024, (2, 2), 500),
    "resnet18": ("resnet18", 224, 256, (4, 4), 200),
    "resnet18-20k": ("resnet18", 224, 1024, (4, 4), 20000),
    "resnet50-20k": ("resnet50", 224, 1024, (4, 4), 20000),
}


def prepare(job: str, root: Path) -> tuple[nn.Module, Tensor]:
    """The job's network and calibration images: trained, or untrained with the statistics of real crops."""
    name, size, count, _, _ = JOBS[job]
    if name == "resnet20":
        data = ptq.ImageFolderData(str(root), resize=None, crop=None, calibration_samples=count, seed=0)
        data.setup("fit")
        return trained(name, root), data.calibration_images()
    model, images = random_model(name), crops(count, size, seed=1)
    settle(model, images[:64])
    return model, images


def choose_kernels(variant: str) -> None:
    """Have this process go without compiled kernels, on a CPU or a GPU, where the variant is of torch's operations."""
    if variant == "operations":
        kernels.cpu_kernels = kernels._gpu_kernels = lambda: None


def run(job: str, variant: str, steps: int | None, root: Path, accelerator: str) -> dict[str, Any]:
    """One calibration in this process; `steps` in place of the job's."""
    choose_kernels(variant)
    model, images = prepare(job, root)
    *_, (weight_bits, act_bits), usual = JOBS[job]
    steps = usual if steps is None else steps
    yardstick = Yardstick(model, images, accelerator, len(images))
    module = ptq.PTQModule(
        model, ptq.QuantConfig(weight_bits, act_bits), steps_per_unit=steps, seed=0, report=False, **VARIANTS[variant]
    )
    data = ptq.CalibrationDataModule.from_loaders([images], calibration_samples=len(images))
    yardstick.measure(3)
    before = time.perf_counter()
    measuring = sum(yardstick.seconds)
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            accelerator=accelerator,
            devices=1,
            max_epochs=-1,
            logger=False,
            enable_progress_bar=False,
            default_root_dir=folder,
            **TRAINER.get(variant, {}),
            callbacks=[_Measure(yardstick)],
        ).fit(module, datamodule=data)
        summary = json.loads((Path(folder) / "summary.json").read_text())
    measuring = sum(yardstick.seconds) - measuring
    fit = time.perf_counter() - before - measuring
    work = summary["wall_seconds"]["ranges"] + summary["wall_seconds"]["calibration"]  # the yardstick's are between
    return {
        "job": job,
        "variant": variant,
        "steps": steps,
        "device": torch.cuda.get_device_name() if accelerator == "gpu" else f"cpu, {torch.get_num_threads()} threads",
        "f_seconds": round(yardstick.f, 4),
        "seconds": round(work, 2),
        "fit_seconds": round(fit, 2),
        "over_f": round(work / yardstick.f, 1),
        "units": {unit["name"]: round(unit["seconds"], 3) for unit in summary["units"]},
        "peak_rss_mib": round(summary["peak_rss_bytes"] / 2**20),
        "peak_device_mib": round((summary["peak_device_bytes"] or 0) / 2**20),
        "commit": commit(),
    }


class _Measure(L.Callback):
    """A pass of the yardstick before every second epoch."""

    def __init__(self, yardstick: Yardstick) -> None:
        self.yardstick = yardstick

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch % 2:
            self.yardstick.measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/, val/ and teachers/")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=["cifar"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["qdrop", "contrastive"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each unit, in place of the job's")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/speed.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(*args.one.split("/"), args.steps, args.root, args.accelerator)))
        return
    options = ["--root", str(args.root), "--accelerator", args.accelerator]
    options += [] if args.steps is None else ["--steps", str(args.steps)]
    print(f"{'job':<14} {'variant':<12} {'F s':>8} {'seconds':>9} {'F':>7} {'ratio':>6} {'MiB':>6} {'GPU MiB':>8}")
    for job in args.jobs:
        rows: dict[str, list[dict[str, Any]]] = {variant: [] for variant in args.variants}
        for _ in range(args.repeats):
            for variant in args.variants:
                row = in_process("speed", *options, "--one", f"{job}/{variant}")
                rows[variant].append(row)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + os.linesep)
        first = rows[args.variants[0]]
        for variant, found in rows.items():
            middle = {key: statistics.median(row[key] for row in found) for key in ("f_seconds", "seconds", "over_f")}
            ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(found, first, strict=True))
            peaks = (max(row[key] for row in found) for key in ("peak_rss_mib", "peak_device_mib"))
            times = f"{middle['f_seconds']:>8.3f} {middle['seconds']:>9.2f} {middle['over_f']:>7.1f} {ratio:>6.2f}"
            print(f"{job:<14} {variant:<12} {times} {next(peaks):>6} {next(peaks):>8}")


if __name__ == "__main__":
    main()
