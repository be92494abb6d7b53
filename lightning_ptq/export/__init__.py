"""From a calibrated module to a file that a runtime executes, checked against the simulation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ptq.errors import PTQError
from lightning_ptq.export.check import check_exportable, describe
from lightning_ptq.export.onnx import onnx_model, require
from lightning_ptq.export.packed import load_packed, save_packed
from lightning_ptq.export.parity import ParityReport, compare_outputs, first_difference, passes, size_of

if TYPE_CHECKING:
    from lightning_ptq.module import PTQModule

__all__ = ["ParityReport", "export_onnx", "load_packed", "save_packed"]

# Images that tell which unit differs.
_LOOKED_AT = 16


def export_onnx(
    module: PTQModule, path: str | Path, images: Tensor | None = None, *, overwrite: bool = False
) -> ParityReport:
    """Write a calibrated module's student as an ONNX model, run both, and say whether they agree.

    The file is written in any case; what does not pass names the unit where the two part.

    Args:
        module: after `fit`, or from its checkpoint.
        path: where to write; a file that is there is kept unless `overwrite`.
        images: (N, C, H, W) to compare on; None takes the calibration images of the module's datamodule.

    Raises:
        PTQError: a missing package, a file that exists, a module that is not fully calibrated or holds what is for
            simulation only, no images, or an operation that ONNX can't express.
    """
    path = Path(path)
    require("onnx", "onnxscript", "onnxruntime")
    check_exportable(module, path, overwrite)
    images = calibration_images(module) if images is None else module.checked(images)
    shape, metadata = tuple(images.shape[1:]), describe(module)
    was_training, device = module.training, module.device
    module.eval()
    try:
        model = onnx_model(module.student, shape, metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(model, path)
        agreement, sqnr_db, largest = compare_outputs(module.student, lambda x: run_onnx(path, x)[0], images)
        passed, unit = passes(agreement, sqnr_db, module.quant.placement == "hardware"), None
        if not passed:
            apart = path.with_name(f".{path.name}.units")
            save(onnx_model(module.student, shape, {}, every_unit=True), apart)
            few = images[:_LOOKED_AT]
            unit = first_difference(module.student, run_onnx(apart, few), few)
            apart.unlink()
    finally:
        module.train(was_training).to(device)
    return ParityReport(str(path), size_of(path), len(images), agreement, sqnr_db, largest, passed, unit)


def calibration_images(module: PTQModule) -> Tensor:
    """The calibration images of the module's datamodule."""
    data = None if module._trainer is None else module.trainer.datamodule  # type: ignore[attr-defined]
    if data is None:
        raise PTQError("parity needs images, and this module has no datamodule. Give images=..., (N, C, H, W).")
    return module.checked(data.calibration_images())


def save(model: Any, path: Path) -> None:
    """Write an ONNX model to a temporary file and rename it."""
    import onnx

    temporary = path.with_name(f".{path.name}.tmp")
    onnx.save(model, str(temporary))
    temporary.replace(path)


def run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    """What ONNX Runtime, on the CPU, makes of `images` (N, C, H, W)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [torch.from_numpy(output) for output in session.run(None, {name: images.cpu().numpy()})]
