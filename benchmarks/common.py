"""What the benchmarks share: the trained networks, the yardstick F, and where a result came from."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torchvision.models import MobileNetV2

from lightning_ptq import CalibrationDataModule, PTQModule, QuantConfig
from lightning_ptq.building import load_weights
from lightning_ptq.graph import build_chain
from lightning_ptq.models import resnet20

DEFAULT_ROOT = os.environ.get("LIGHTNING_PTQ_CIFAR10", "../shared/cifar10")


def trained(name: str, root: Path) -> nn.Module:
    """The network called "resnet20" or "mobilenetv2" whose weights lie below `root`, in eval mode."""
    if name == "resnet20":
        model: nn.Module = resnet20()
    else:  # as the data's README has it
        settings = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 2], [6, 64, 2, 1]]
        model = MobileNetV2(num_classes=10, dropout=0.0, inverted_residual_setting=settings)
    load_weights(model, str(root / "teachers" / f"{name}.pt"))
    return model.eval()


def calibrate(
    module: PTQModule, data: CalibrationDataModule, folder: str, *callbacks: L.Callback, max_epochs: int = -1
) -> None:
    """Fit on the CPU without bars and loggers; what a run leaves goes to `folder`."""
    L.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        callbacks=list(callbacks),
    ).fit(module, datamodule=data)


class Yardstick:
    """F: seconds of one float32 forward pass of the folded network over `count` images in batches of 32.

    Machines change their speed within a run, so passes are taken all along it, and F is their median.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor, accelerator: str = "cpu", count: int = 1024) -> None:
        self.device = torch.device("cuda" if accelerator == "gpu" else "cpu")
        self.chain = build_chain(model, QuantConfig(), "net").teacher.to(self.device)
        self.batches = images[torch.arange(count) % len(images)].split(32)
        self.seconds: list[float] = []

    def measure(self, passes: int = 1) -> None:
        """Time so many passes."""
        with torch.no_grad():
            for _ in range(passes):
                start = time.perf_counter()
                for batch in self.batches:
                    self.chain(batch.to(self.device))
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                self.seconds.append(time.perf_counter() - start)

    @property
    def f(self) -> float:
        """Median of the passes taken."""
        return statistics.median(self.seconds)


def in_process(benchmark: str, *arguments: str, limit: float | None = None) -> Any:
    """What the last line that a benchmark prints says, in JSON; it runs in a process of its own, with its own memory.

    Raises:
        RuntimeError: it died, of what the message says, or took longer than `limit` seconds.
    """
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{benchmark}", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {limit:.0f} s") from None
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise RuntimeError(last[-1][:300])
    return json.loads(done.stdout.splitlines()[-1])


def complete(
    out: Path, columns: Sequence[str], names: Iterable[str], rows_of: Callable[[str], list[dict[str, Any]]]
) -> list[dict[str, str]]:
    """The rows of a CSV file, once those of the `names` that its first column lacks are added, name by name."""
    rows = read(out)
    for name in names:
        if name in {row[columns[0]] for row in rows}:
            continue
        new = [{column: str(row.get(column, "")) for column in columns} for row in rows_of(name)]
        append(out, columns, new)
        rows += new
    return rows


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV file, none if there is no file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def append(out: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a CSV file, which begins with the columns' names."""
    new = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def commit() -> str:
    """Short hash of the checkout that runs, with a mark if anything but rows and what is made of them was changed."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=folder, check=False)

    changed = git(
        "diff", "--quiet", "HEAD", "--", ":/", ":(exclude,top)benchmarks/*.csv", ":(exclude,top)docs"
    ).returncode
    return git("rev-parse", "--short", "HEAD").stdout.strip() + "-dirty" * bool(changed)
