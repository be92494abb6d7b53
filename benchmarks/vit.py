"""Small vision transformers, trained here on real images, then quantized: `python -m benchmarks.vit --seeds 0 1 2`.

torchvision's own class. "digits": 4 layers of width 64, trained on the 1000 images of the demo's training part, judged
on the other 797. "cifar10" (`--data cifar10 --root FOLDER`): 6 layers of width 96, trained on the 2050 images of
`calib/` with the predictions of the shared ResNet-20 as targets, judged on `val/`. Calibration sees the training images
without labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

from benchmarks.common import DEFAULT_ROOT, calibrate, commit
from benchmarks.training import shared_images, train
from lightning_ptq import CalibrationDataModule, ImageFolderData, PTQModule, QuantConfig
from lightning_ptq.datasets import digits


def transformer(data: str) -> nn.Module:
    """Untrained: (N, 1, 8, 8) or (N, 3, 32, 32) -> (N, 10)."""
    if data == "digits":
        model = VisionTransformer(8, 2, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
        model.conv_proj = nn.Conv2d(1, 64, 2, 2)
    else:
        model = VisionTransformer(32, 4, num_layers=6, num_heads=4, hidden_dim=96, mlp_dim=192, num_classes=10)
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return model


def prepared(data: str, root: Path, epochs: int, weights: Path | None) -> tuple[nn.Module, Any]:
    """The trained transformer, from `weights` if that file exists, and a function seed -> datamodule."""

    def datamodule(seed: int) -> CalibrationDataModule:
        if data == "cifar10":
            return ImageFolderData(str(root), resize=None, crop=None, seed=seed)
        train_part, val_part = TensorDataset(digits(train=True).tensors[0]), digits(train=False)
        return CalibrationDataModule.from_loaders(DataLoader(train_part, 100), DataLoader(val_part, 100))

    if weights is not None and weights.exists():
        model = transformer(data)
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval(), datamodule
    if data == "cifar10":
        images, targets = shared_images(root)
    else:
        images, labels = digits(train=True).tensors
        targets = nn.functional.one_hot(labels, 10).float()
    torch.manual_seed(0)
    real = data == "cifar10"
    model = train(transformer(data), images, targets, epochs, 3e-3, 50, 0.1, shift=3 if real else 1, mirror=real)
    if weights is not None:
        torch.save(model.state_dict(), weights)
    return model, datamodule


def summary_of(model: nn.Module, data: CalibrationDataModule, bits: int, **options: Any) -> dict[str, Any]:
    """The summary of one calibration."""
    with tempfile.TemporaryDirectory() as folder:
        calibrate(PTQModule(model, QuantConfig(bits, bits), report=False, **options), data, folder)
        return json.loads((Path(folder) / "summary.json").read_text())  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/, val/ and teachers/")
    parser.add_argument("--weights", type=Path, help="file that keeps the trained transformer")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contrastive", action="store_true")
    args = parser.parse_args()
    model, datamodule = prepared(args.data, args.root, args.epochs, args.weights)
    shape = (1, 8, 8) if args.data == "digits" else (3, 32, 32)
    print(f"commit {commit()}, {args.data}, {args.steps} steps per unit, contrastive {args.contrastive}")
    for bits in args.bits:
        options = {"steps_per_unit": args.steps, "contrastive": args.contrastive, "image_shape": shape}
        found = [summary_of(model, datamodule(seed), bits, seed=seed, **options) for seed in args.seeds]
        for name in ("teacher_top1", "nearest_top1", "student_top1", "teacher_agreement"):
            values = [summary[name] for summary in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"W{bits}A{bits} {name:<18} {statistics.mean(values):6.2f} +- {spread:.2f}, n = {len(values)}")


if __name__ == "__main__":
    main()
