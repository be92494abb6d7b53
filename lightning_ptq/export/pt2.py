"""A calibrated student as an exported program of PyTorch (`.pt2`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from lightning_ptq.convert import convert
from lightning_ptq.files import write_whole
from lightning_ptq.graph.units import Chain


def save_pt2(student: Chain, image_shape: Sequence[int], path: Path, every_unit: bool = False) -> None:
    """Write the integer model, for any number of images of `image_shape` (C, H, W)."""
    images = torch.zeros(2, *image_shape)
    program = torch.export.export(
        convert(student, every_unit), (images,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False
    )
    write_whole(path, lambda to: torch.export.save(program, to))


def load_pt2(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """What runs such a file on the CPU: images (N, C, H, W) -> outputs."""
    model = torch.export.load(path).module()

    def run(images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return tree_leaves(model(images.cpu()))

    return run
