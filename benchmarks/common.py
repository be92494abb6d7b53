"""What the benchmarks share: the trained networks, the yardstick F, and where a result came from."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch import nn
from torchvision.models import MobileNetV2

from lightning_ptq import QuantConfig
from lightning_ptq.cli import load_weights
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
