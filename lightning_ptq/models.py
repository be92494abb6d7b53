"""The two small networks that the shipped configs calibrate."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut (option A of He et al. 2015, section 4.2).

    Shape: (N, inputs, H, W) -> (N, outputs, H / stride, W / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Every `stride`-th pixel, zero channels added evenly on both sides."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding)) if self.padding else x


class CifarResNet(nn.Module):
    """ResNet for small images (He et al. 2015, section 4.2): stem, stages of basic blocks, pooling, linear head.

    Args:
        blocks: number of blocks of each stage; every stage but the first halves the resolution.
        widths: channels of each stage.
        in_channels: channels of the images.
        num_classes: number of logits.

    Shape: (N, in_channels, H, W) -> (N, num_classes).
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 64),
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = [f"layer{i}" for i in range(1, len(blocks) + 1)]
        inputs = widths[0]
        for i, (name, count, width) in enumerate(zip(self.stages, blocks, widths, strict=True)):
            strides = [1 if i == 0 else 2] + [1] * (count - 1)
            stage = [BasicBlock(inputs if j == 0 else width, width, stride) for j, stride in enumerate(strides)]
            self.add_module(name, nn.Sequential(*stage))
            inputs = width
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, C)
        logits: Tensor = self.linear(x)
        return logits


def resnet20() -> CifarResNet:
    """ResNet-20 for CIFAR-10, 0.27 million parameters: (N, 3, 32, 32) -> (N, 10)."""
    return CifarResNet()


def digits_net() -> CifarResNet:
    """Residual network for the 8x8 digits of scikit-learn, 38 thousand parameters: (N, 1, 8, 8) -> (N, 10)."""
    return CifarResNet(blocks=(1, 2), widths=(16, 32), in_channels=1)
