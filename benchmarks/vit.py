"""Small vision transformers, trained here on real images, then quantized: `python -m benchmarks.vit --seeds 0 1 2`.

torchvision's own class. "digits": 4 layers of width 64, trained on the 1000 images of the demo's training part, judged
on the other 797. "numbers": 4 layers of width 56 read three digits side by side, one class for each of the 1000
numbers; they are trained on numbers made of the same 1000 images, and 4000 numbers made of the others judge. "cifar10"
(`--data cifar10 --root FOLDER`): 6 layers of width 96, trained on the 2050 images of `calib/` with the predictions of
the shared ResNet-20 as targets, judged on `val/`. Calibration sees training images without labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

from benchmarks.common import DEFAULT_ROOT, calibrate, commit
from benchmarks.training import shared_images, train
from lightning_ptq import CalibrationDataModule, ImageFolderData, PTQModule, QuantConfig
from lightning_ptq.datasets import digits

# Digits of a number; numbers to calibrate on, of which a tenth judges; those of the accuracies; steps of training, and
# numbers of each.
PLACES, SEEN, JUDGED, TRAINING, BATCH = 3, 1126, 4000, 5000, 100
WIDTH = 56


class Reader(VisionTransformer):
    """torchvision's transformer for images that are no squares."""

    def __init__(self, places: int) -> None:
        super().__init__(8, 2, num_layers=4, num_heads=4, hidden_dim=WIDTH, mlp_dim=2 * WIDTH, num_classes=10**places)
        self.conv_proj = nn.Conv2d(1, WIDTH, 2, 2)
        self.encoder.pos_embedding = nn.Parameter(torch.empty(1, 16 * places + 1, WIDTH).normal_(std=0.02))

    def _process_input(self, x: Tensor) -> Tensor:
        return self.conv_proj(x).flatten(2).transpose(1, 2)


def numbers(part: TensorDataset, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(images (count, 1, 8, 8 * PLACES), numbers (count,)), of digits drawn from one `part` of the demo's."""
    images, labels = part.tensors
    drawn = torch.randint(len(images), (count, PLACES), generator=generator)
    worth = 10 ** torch.arange(PLACES - 1, -1, -1)
    return torch.cat(images[drawn].unbind(1), 3), (labels[drawn] * worth).sum(1)


def reader() -> nn.Module:
    """A `Reader`, trained on numbers that are drawn anew for each step."""
    model, part, generator = Reader(PLACES), digits(train=True), torch.Generator().manual_seed(1)
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=TRAINING)
    for _ in range(TRAINING):
        images, wanted = numbers(part, BATCH, generator)
        loss = nn.functional.cross_entropy(model(images), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def transformer(data: str) -> nn.Module:
    """Untrained: (N, 1, 8, 8), (N, 1, 8, 24) or (N, 3, 32, 32) -> scores."""
    if data == "numbers":
        return Reader(PLACES)
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
        if data == "numbers":
            seen, _ = numbers(digits(train=True), SEEN, torch.Generator().manual_seed(100 + seed))
            judged = numbers(digits(train=False), JUDGED, torch.Generator().manual_seed(7))
            loaders = DataLoader(TensorDataset(seen), 100), DataLoader(TensorDataset(*judged), 500)
            return CalibrationDataModule.from_loaders(*loaders, calibration_samples=1024)
        train_part, val_part = TensorDataset(digits(train=True).tensors[0]), digits(train=False)
        return CalibrationDataModule.from_loaders(DataLoader(train_part, 100), DataLoader(val_part, 100))

    if weights is not None and weights.exists():
        model = transformer(data)
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval(), datamodule
    if data == "numbers":
        torch.manual_seed(0)
        model = reader()
    else:
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
    parser.add_argument("--data", choices=["digits", "numbers", "cifar10"], default="digits")
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/, val/ and teachers/")
    parser.add_argument("--weights", type=Path, help="file that keeps the trained transformer")
    parser.add_argument("--epochs", type=int, default=100, help="of training, but for numbers")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--network-steps", type=int, help="of the last epoch; 0 for none, else the default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contrastive", action="store_true")
    args = parser.parse_args()
    model, datamodule = prepared(args.data, args.root, args.epochs, args.weights)
    shape = {"digits": (1, 8, 8), "numbers": (1, 8, 8 * PLACES), "cifar10": (3, 32, 32)}[args.data]
    last = "of default length" if args.network_steps is None else f"of {args.network_steps} steps"
    steps = f"{args.steps} steps per unit, last epoch {last}"
    print(f"commit {commit()}, {args.data}, {steps}, contrastive {args.contrastive}")
    for bits in args.bits:
        options = {"steps_per_unit": args.steps, "contrastive": args.contrastive, "image_shape": shape}
        options["network_steps"] = args.network_steps
        found = [summary_of(model, datamodule(seed), bits, seed=seed, **options) for seed in args.seeds]
        for name in ("teacher_top1", "nearest_top1", "student_top1", "teacher_agreement"):
            values = [summary[name] for summary in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"W{bits}A{bits} {name:<18} {statistics.mean(values):6.2f} +- {spread:.2f}, n = {len(values)}")


if __name__ == "__main__":
    main()
