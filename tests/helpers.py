"""Small networks and data; importable by spawned processes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import CalibrationDataModule, PTQModule, QuantConfig


class Block(nn.Module):
    """A residual block with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class TinyNet(nn.Module):
    """Stem, two residual blocks, head: four units; 3x8x8 images, 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def tiny_net() -> TinyNet:
    """Seeded weights and batch-norm statistics, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = TinyNet()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
        return net.eval()


def tiny_images(count: int = 40, seed: int = 1) -> Tensor:
    """(count, 3, 8, 8) images with some structure."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, scale_factor=2) + 0.3 * torch.randn(count, 3, 8, 8, generator=generator)


def tiny_data(count: int = 40, more: int = 0) -> CalibrationDataModule:
    """Calibration and labelled validation batches of such images; the labels are the float network's own.

    There are `more` images than are to be drawn.
    """
    validation = tiny_images(30, seed=2)
    with torch.no_grad():
        labels = tiny_net()(validation).argmax(1)
    loader = DataLoader(TensorDataset(validation, labels), batch_size=16)
    return CalibrationDataModule.from_loaders(tiny_images(count + more).split(16), loader, calibration_samples=count)


def tiny_module(quant: QuantConfig = QuantConfig(weight_bits=2, act_bits=2), **changes: Any) -> PTQModule:  # noqa: B008
    """W2A2 qdrop with few steps."""
    settings: dict[str, Any] = {"method": "qdrop", "steps_per_unit": 6, "batch_size": 8, "seed": 3}
    return PTQModule(tiny_net(), quant, **(settings | changes))


def trainer(folder: Path, **changes: Any) -> L.Trainer:
    """A quiet CPU trainer."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 2,
    }
    return L.Trainer(**(settings | changes))


def quantization_state(module: PTQModule) -> dict[str, Tensor]:
    """Everything that calibration can change."""
    return {k: v.clone() for k, v in module.state_dict().items() if not k.startswith(("teacher.", "rates."))}


def assert_equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit-equal, key by key."""
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different
