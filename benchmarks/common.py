"""What the benchmarks share: the trained ResNet-20, the yardstick F, and where a result came from."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch import nn

from lightning_ptq import QuantConfig
from lightning_ptq.cli import load_weights
from lightning_ptq.graph import build_chain
from lightning_ptq.models import resnet20

DEFAULT_ROOT = os.environ.get("LIGHTNING_PTQ_CIFAR10", "../shared/cifar10")


def trained_resnet20(root: Path) -> nn.Module:
    """The CIFAR ResNet-20 whose weights lie below `root`, in eval mode."""
    model = resnet20()
    load_weights(model, str(root / "teachers" / "resnet20.pt"))
    return model.eval()


def seconds_of_forward(model: nn.Module, images: torch.Tensor, repeats: int = 5) -> float:
    """F: one float32 forward pass of the folded network over 1024 images in batches of 32; median of `repeats`."""
    chain = build_chain(model, QuantConfig(), "net").teacher
    batches = images[torch.arange(1024) % len(images)].split(32)
    times = []
    with torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            for batch in batches:
                chain(batch)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def commit() -> str:
    """Short hash of the checkout that runs, with a mark if it was changed since."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True).stdout.strip()
