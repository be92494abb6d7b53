"""Train the teacher of the quickstart: `python -m lightning_ptq.demo.train_digits` writes `digits.pt` in seconds."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_ptq.datasets import digits
from lightning_ptq.models import digits_net

WEIGHTS = Path(__file__).with_name("digits.pt")
EPOCHS = 60
BATCH = 50
PEAK_LR = 1e-2


def train(seed: int = 0) -> nn.Module:
    """Train `digits_net` on the training part of the digits, each batch rolled by up to one pixel at random."""
    torch.manual_seed(seed)
    images, labels = digits(train=True).tensors  # (1000, 1, 8, 8), (1000,)
    model = digits_net().train()
    steps = EPOCHS * len(labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(labels)).split(BATCH):
            dy, dx = torch.randint(-1, 2, (2,)).tolist()
            rolled = images[index].roll((dy, dx), dims=(2, 3))
            loss = nn.functional.cross_entropy(model(rolled), labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def top1(model: nn.Module) -> float:
    """Top-1 accuracy on the validation part of the digits, in percent."""
    images, labels = digits(train=False).tensors  # (797, 1, 8, 8), (797,)
    predicted: Tensor = model(images).argmax(dim=1)
    return 100 * (predicted == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where to write the state dict")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = train(args.seed)
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, args.out)
    print(f"top-1 {top1(model):.2f} %, {args.out.stat().st_size / 1000:.0f} kB -> {args.out}")


if __name__ == "__main__":
    main()
