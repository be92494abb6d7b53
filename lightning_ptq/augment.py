"""Calibration images changed at random, so that few of them tell more; for the epoch that reads images: the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_ptq.errors import PTQError


@dataclass(frozen=True)
class Augmentation:
    """Which changes are drawn anew for every image of every step. Both leave single pixels as they are.

    Args:
        flip: mirror every second image from left to right, on average.
        shift: move an image by up to so many pixels up or down, left or right; its edge is mirrored into the gap.

    Raises:
        PTQError: a negative shift.
    """

    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.shift, bool) or not isinstance(self.shift, int) or self.shift < 0:
            raise PTQError(f"augment shift={self.shift} is no number of pixels. Use 0 to leave images in their place.")

    def __bool__(self) -> bool:
        return bool(self.flip) or self.shift > 0

    def check(self, images: Tensor) -> None:
        """Raise `PTQError` if `images` (N, C, H, W) are no larger than the shift."""
        height, width = images.shape[2:]
        if self.shift >= min(height, width):
            raise PTQError(
                f"augment shift={self.shift} needs larger images than {height} x {width}. Use a smaller shift."
            )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """`images` (B, C, H, W), which `check` has passed, changed by draws of a generator on the CPU."""
        count, channels, height, width = images.shape
        if self.flip:
            mirrored = torch.rand(count, generator=generator) < 0.5
            images = torch.where(
                mirrored.view(-1, 1, 1, 1).to(images.device, non_blocking=True), images.flip(3), images
            )
        if self.shift:
            padded = pad(images, [self.shift] * 4, mode="reflect")
            offsets = torch.randint(0, 2 * self.shift + 1, (2, count, 1), generator=generator)
            down, right = offsets.to(images.device, non_blocking=True)
            rows = (down + torch.arange(height, device=images.device)).view(count, 1, height, 1)
            columns = (right + torch.arange(width, device=images.device)).view(count, 1, 1, width)
            image = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
            channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
            images = padded[image, channel, rows, columns]
        return images
