"""From a calibrated module to a file that a runtime executes, checked against the simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ptq.errors import PTQError
from lightning_ptq.export.check import check_exportable, describe
from lightning_ptq.export.lowering import compiled, kernels
from lightning_ptq.export.onnx import load_onnx, onnx_model, require, save_onnx
from lightning_ptq.export.packed import load_packed, save_packed
from lightning_ptq.export.parity import (
    LEAST,
    LEAST_OPTIMISED,
    ParityReport,
    Run,
    as_rounding_allows,
    compare_outputs,
    first_difference,
    in_double,
)
from lightning_ptq.export.pt2 import as_outputs, load_pt2, lower_pt2, lowered, save_pt2
from lightning_ptq.memory import unit_shapes

if TYPE_CHECKING:
    from lightning_ptq.module import PTQModule

__all__ = [
    "ParityReport",
    "compare_lowered",
    "export_onnx",
    "export_pt2",
    "load_packed",
    "lower_pt2",
    "save_packed",
]

# Images that tell which unit differs.
_LOOKED_AT = 16
# Writes the network, or each unit's output, to a file; and what runs such a file.
Write = Callable[[Path, bool], None]
Load = Callable[[Path], Run]


def export_onnx(
    module: PTQModule, path: str | Path, images: Tensor | None = None, *, overwrite: bool = False
) -> ParityReport:
    """Write a calibrated module's student as an ONNX model, run it in ONNX Runtime, and say whether the two agree.

    The file is written in any case; what does not pass names the unit where the two part.

    Args:
        module: after `fit`, or from its checkpoint.
        path: where to write; a file that is there is kept unless `overwrite`.
        images: (N, C, H, W) to compare on; None takes the calibration images of the module's datamodule.

    Raises:
        PTQError: a missing package, a file that exists, a module that is not fully calibrated or holds what is for
            simulation only, no images, or an operation that ONNX can't express.
    """
    require("onnx", "onnxscript", "onnxruntime")

    def write(to: Path, every_unit: bool) -> None:
        integers = module.quant.placement == "hardware"  # there the kernels want them
        save_onnx(onnx_model(module.student, shape, metadata, every_unit, integers), to)

    path, images = prepare(module, Path(path), images, overwrite)
    shape, metadata = tuple(images.shape[1:]), describe(module)
    return written_and_compared(module, path, images, write, load_onnx, partial(load_onnx, optimised=False))


def export_pt2(
    module: PTQModule, path: str | Path, images: Tensor | None = None, *, overwrite: bool = False
) -> ParityReport:
    """Write a calibrated module's student as an exported program of PyTorch, run it, and say whether the two agree.

    Who loads it with `torch.export.load` imports `lightning_ptq.convert` first, which registers the operations.
    Arguments and errors as those of `export_onnx`.
    """

    def write(to: Path, every_unit: bool) -> None:
        save_pt2(module.student, shape, to, every_unit)

    path, images = prepare(module, Path(path), images, overwrite)
    shape = tuple(images.shape[1:])
    return written_and_compared(module, path, images, write, load_pt2)


def compare_lowered(module: PTQModule, path: str | Path, images: Tensor | None = None) -> ParityReport:
    """Run what `export_pt2` wrote as `lower_pt2` does, compiled, and say whether it agrees with the simulation.

    Arguments as those of `export_pt2`, errors as those of `lower_pt2`.
    """
    path = Path(path)
    images = images_to_compare(module, images)

    def write(to: Path, every_unit: bool) -> None:
        save_pt2(module.student, tuple(images.shape[1:]), to, every_unit)

    counts: list[tuple[int, int]] = []

    def load(file: Path) -> Run:
        program = lowered(file, compile=True)
        counts.append(kernels(program))
        return as_outputs(compiled(program))

    report = compared(module, path, images, write, load, load_pt2)
    return replace(report, kernels=counts[0])  # of the file itself; another may tell which unit differs


def prepare(module: PTQModule, path: Path, images: Tensor | None, overwrite: bool) -> tuple[Path, Tensor]:
    """Check what is to be exported; the images to compare on."""
    check_exportable(module, path, overwrite)
    images = images_to_compare(module, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, images


def written_and_compared(
    module: PTQModule, path: Path, images: Tensor, write: Write, load: Load, plain: Load | None = None
) -> ParityReport:
    """Write the student, load the file again and compare the two; `plain` loads it without optimisations."""
    write(path, False)
    return compared(module, path, images, write, load, plain)


def compared(
    module: PTQModule, path: Path, images: Tensor, write: Write, load: Load, plain: Load | None
) -> ParityReport:
    """Compare a file with the student; `write` is for the outputs of all units, where the two differ."""
    was_training = module.training
    module.eval()
    try:
        found = compare_outputs(module.student, load(path), images)
        passed, plain_db, own_db, unit, differs = found.reaches(*LEAST), None, None, None, load
        if not passed:
            own = compare_outputs(module.student, in_double(module.student), images)
            own_db, least = own.sqnr_db, as_rounding_allows(own)
            if plain is None:
                passed = found.reaches(*least)
            else:
                unoptimised = compare_outputs(module.student, plain(path), images)
                plain_db = unoptimised.sqnr_db
                if unoptimised.reaches(*least):
                    passed = found.reaches(*LEAST_OPTIMISED)
                else:
                    differs = plain
        if not passed:
            apart, few = path.with_name(f".{path.stem}.units{path.suffix}"), images[:_LOOKED_AT]
            try:
                write(apart, True)
                unit = first_difference(module.student, differs(apart)(few), few)
            finally:
                apart.unlink(missing_ok=True)
    finally:
        module.train(was_training)
    size = path.stat().st_size
    told = (found.agreement, found.sqnr_db, found.largest_difference)
    return ParityReport(str(path), size, len(images), *told, passed, plain_db, own_db, unit)


def images_to_compare(module: PTQModule, images: Tensor | None) -> Tensor:
    """Images (N, C, H, W) in float32, as the student reads them, or those of the calibration; `PTQError` for others."""
    if images is None:
        return calibration_images(module)
    if images.dtype != torch.float32 or images.dim() != 4 or not len(images):
        raise PTQError(
            f"parity needs images (N, C, H, W) in float32, and got {tuple(images.shape)} in "
            f"{str(images.dtype).removeprefix('torch.')}. Give them as the model takes them: normalised, and a batch."
        )
    images = module.checked(images)
    unit_shapes(module.teacher, tuple(images.shape[1:]))
    return images


def calibration_images(module: PTQModule) -> Tensor:
    """The calibration images of the module's datamodule."""
    data = None if module._trainer is None else module.trainer.datamodule  # type: ignore[attr-defined]
    if data is None:
        raise PTQError("parity needs images, and this module has no datamodule. Give images=..., (N, C, H, W).")
    return module.checked(data.calibration_images())
