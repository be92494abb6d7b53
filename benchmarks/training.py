"""Short trainings of networks for benchmarks, where none with trained weights is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad

from benchmarks.common import trained
from lightning_ptq import ImageFolderData

# torchvision's networks learn the shared images at so many pixels, for so many epochs.
SIZE = 64
EPOCHS = {"resnet18": 12, "mobilenet_v2": 20, "efficientnet_b0": 24, "vit_b_16": 1}
# Depthwise networks that learned so little make much of little: one value that is rounded to the next integer changes
# many behind it. Their residual branches start closed, and more epochs follow for one of them, with noise of so many
# standard deviations: (epochs, deviations).
DEPTHWISE = ("mobilenet_v2", "efficientnet_b0")
NOISE = {"efficientnet_b0": ((12, 0.3), (8, 0.6), (5, 0.2))}


def train(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    epochs: int,
    rate: float,
    batch: int,
    smoothing: float = 0.0,
    shift: int = 0,
    mirror: bool = True,
) -> nn.Module:
    """Train `model` in place with AdamW and one cycle of its rate, and give it back in eval mode.

    Args:
        images: (N, C, H, W); a batch is moved by up to `shift` pixels and, half of the time, flipped if `mirror`.
        targets: (N, classes), probabilities.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=5e-2)
    total = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch):
            x = images[index].flip(3) if mirror and torch.rand(()) < 0.5 else images[index]
            if shift:
                top, left = torch.randint(0, 2 * shift + 1, (2,)).tolist()
                height, width = x.shape[2:]
                x = pad(x, (shift,) * 4, mode="replicate")[:, :, top : top + height, left : left + width]
            loss = cross_entropy(model(x), targets[index], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@contextmanager
def noisy(model: nn.Module, deviations: float) -> Iterator[None]:
    """Inside, what norms and activations give in training has noise of so many of its standard deviations."""

    def disturb(module: nn.Module, _: object, out: Tensor) -> Tensor | None:
        return out + torch.randn_like(out) * (deviations * out.detach().std()) if module.training else None

    kinds = (nn.BatchNorm2d, nn.SiLU, nn.ReLU6)
    hooks = [m.register_forward_hook(disturb) for m in model.modules() if isinstance(m, kinds)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def close_branches(model: nn.Module) -> None:
    """Have the last norm of every residual branch of a depthwise network of torchvision give nothing to begin with."""
    for block in model.modules():
        if getattr(block, "use_res_connect", False):
            nn.init.zeros_([m for m in block.modules() if isinstance(m, nn.BatchNorm2d)][-1].weight)


def shared_images(root: Path) -> tuple[Tensor, Tensor]:
    """The 2050 images of calib/ (N, 3, 32, 32) and what the shared ResNet-20 makes of them: probabilities (N, 10)."""
    data = ImageFolderData(str(root), resize=None, crop=None, calibration_samples=2050)
    data.setup("fit")
    images = data.calibration_images()
    teacher = trained("resnet20", root)
    with torch.no_grad():
        return images, torch.cat([teacher(x) for x in images.split(256)]).softmax(1)


def resized(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 3, SIZE, SIZE)."""
    return interpolate(images, (SIZE, SIZE), mode="bilinear")


def briefly_trained(name: str, root: Path, folder: Path) -> nn.Module:
    """A network of torchvision for ten classes, from `folder` if it was trained before, else trained and kept there."""
    transformer = name.startswith("vit")
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(
        name, num_classes=10, **({"image_size": SIZE} if transformer else {})
    )
    file = folder / f"{name}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    images, targets = shared_images(root)
    depthwise = name in DEPTHWISE
    if depthwise:
        close_branches(model)
    rate = 5e-4 if transformer else 1e-3 if depthwise else 2e-3
    train(model, resized(images), targets, EPOCHS[name], rate, batch=32)
    for epochs, deviations in NOISE.get(name, ()):
        with noisy(model, deviations):
            train(model, resized(images), targets, epochs, rate, batch=32)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model
