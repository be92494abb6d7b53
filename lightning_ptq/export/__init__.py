"""From a calibrated module to a file that a runtime executes, checked against the simulation."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ptq.convert import check_convertible
from lightning_ptq.errors import PTQError
from lightning_ptq.export.onnx import onnx_model, require
from lightning_ptq.export.parity import ParityReport, compare_outputs, first_difference, passes, size_of
from lightning_ptq.fingerprint import model_digest

if TYPE_CHECKING:
    from lightning_ptq.module import PTQModule

__all__ = ["ParityReport", "export_onnx"]

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
        passed, unit = passes(agreement, sqnr_db), None
        if not passed:
            apart = path.with_name(f".{path.name}.units")
            save(onnx_model(module.student, shape, {}, every_unit=True), apart)
            few = images[:_LOOKED_AT]
            unit = first_difference(module.student, run_onnx(apart, few), few)
            apart.unlink()
    finally:
        module.train(was_training).to(device)
    return ParityReport(str(path), size_of(path), len(images), agreement, sqnr_db, largest, passed, unit)


def check_exportable(module: PTQModule, path: Path, overwrite: bool) -> None:
    """Raise `PTQError` for what can't be exported, or not to `path`."""
    if path.exists() and not overwrite:
        raise PTQError(f"{str(path)!r} exists and is kept. Give another path, or overwrite=True (--overwrite true).")
    check_convertible(module.student)
    left = module.epoch_names[len(module.reports) :]
    if left:
        raise PTQError(
            f"calibration is not finished: {', '.join(map(repr, left[:6]))}{', ...' if len(left) > 6 else ''} "
            "are left. Go on with fit and ckpt_path."
        )
    if module.surroundings is not None:
        raise PTQError("a part of a model can't be exported yet: its output is packed. Export the model as a whole.")


def calibration_images(module: PTQModule) -> Tensor:
    """The calibration images of the module's datamodule."""
    data = None if module._trainer is None else module.trainer.datamodule  # type: ignore[attr-defined]
    if data is None:
        raise PTQError("parity needs images, and this module has no datamodule. Give images=..., (N, C, H, W).")
    return module.checked(data.calibration_images())


def describe(module: PTQModule) -> dict[str, Any]:
    """What identifies an exported model: plain values."""
    return {
        "lightning_ptq": version("lightning-ptq"),
        "torch": torch.__version__,
        "model": module.model_name,
        "method": module.method_name,
        "contrastive": module.contrastive,
        "weight_bits": module.quant.weight_bits,
        "act_bits": module.quant.act_bits,
        "average_bits": module.quant.average_bits,
        "edges": module.quant.edges,
        "seed": module.seed,
        "teacher_sha256": model_digest(module.teacher),
    }


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
