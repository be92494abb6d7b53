"""A calibrated student as an exported program of PyTorch (`.pt2`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from lightning_ptq.convert import convert
from lightning_ptq.errors import PTQError
from lightning_ptq.export.lowering import compiled, kernels, lower, why_not
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
    return as_outputs(torch.export.load(path).module())


def as_outputs(model: Callable[[Tensor], Any]) -> Callable[[Tensor], Sequence[Tensor]]:
    """What runs `model` on the CPU and gives a sequence of outputs."""

    def run(images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return tree_leaves(model(images.cpu()))

    return run


def lower_pt2(path: str | Path, *, compile: bool = True) -> Callable[[Tensor], Any]:
    """What `export_pt2` wrote, in int8 kernels, on the CPU: images (N, C, H, W) -> what the model returns.

    Args:
        compile: by PyTorch's compiler (inductor), at the first call, which needs a C++ compiler; what is between the
            layers is then computed with fewer passes over memory.

    Raises:
        PTQError: no such file, a machine that can't do it, or a network of which no layer has an int8 kernel.
    """
    if not Path(path).is_file():
        raise PTQError(f"{str(path)!r} is no file. Give what export_pt2 wrote.")
    model = lowered(Path(path), compile)
    return compiled(model) if compile else model


def lowered(path: Path, compile: bool) -> fx.GraphModule:
    """The lowered program of a file, with at least one layer in an int8 kernel; not compiled yet."""
    if reason := why_not(compile):
        raise PTQError(f"no int8 kernels: {reason}. torch.export.load runs the file in floating point.")
    model = lower(torch.export.load(path))
    integer, layers = kernels(model)
    if not integer:
        raise PTQError(
            f"no int8 kernels: none of the {layers} layers has symmetric weights and reads unsigned integers. "
            "Calibrate with quant.weight_symmetric=True, quant.act_symmetric=False and quant.placement='hardware'."
        )
    return model
