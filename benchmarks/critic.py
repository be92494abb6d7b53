"""What the contrastive term costs, by depth of the network: seconds of calibration with it over those without.

    python -m benchmarks.critic                    # run it with nothing beside it

Random weights and images, since only time counts; no last epoch. In one process the settings take turns, and a ratio is
that of medians over the repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import tempfile
import warnings
from statistics import median
from typing import Any

import torch
import torchvision
from torch import nn

import lightning_ptq as ptq
from benchmarks.common import calibrate
from lightning_ptq.models import resnet20

SETTINGS: dict[str, dict[str, Any]] = {
    "without": {},
    "positions": {"contrastive": True},
    "tail": {"contrastive": True, "critic": ptq.ContrastiveConfig(feature="tail")},
}


def network(name: str) -> nn.Module:
    """The CIFAR ResNet-20 or a torchvision network, with random weights, in eval mode."""
    torch.manual_seed(0)
    model: nn.Module = resnet20() if name == "resnet20" else torchvision.models.get_model(name)
    return model.eval()


def seconds(name: str, size: int, steps: int, settings: dict[str, Any]) -> float:
    """Seconds of all units' steps of one calibration at W2A2, with 64 images of `size` x `size` pixels."""
    module = ptq.PTQModule(
        network(name), ptq.QuantConfig(2, 2), steps_per_unit=steps, network_steps=0, seed=0, report=False, **settings
    )
    images = torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(0))
    data = ptq.CalibrationDataModule.from_loaders(images.split(32), calibration_samples=64)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):  # it would print a summary
        calibrate(module, data, folder)
    return module.session.wall_seconds["calibration"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet18", "resnet50"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64, 64], help="of the images, for each network")
    parser.add_argument("--steps", type=int, default=100, help="for each unit; the first 8 also measure balance")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, size in zip(args.networks, args.sizes, strict=True):
        taken: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
        for _ in range(args.repeats):
            for setting, values in taken.items():
                values.append(seconds(name, size, args.steps, SETTINGS[setting]))
        base = median(taken["without"])
        ratios = ", ".join(f"{setting} {median(values) / base:.2f}" for setting, values in taken.items())
        print(f"{name}, {size} x {size}: {base:.1f} s without; times that: {ratios}", flush=True)


if __name__ == "__main__":
    main()
