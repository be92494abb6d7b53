"""What can be exported, and what identifies it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_ptq.convert import check_convertible
from lightning_ptq.errors import PTQError
from lightning_ptq.fingerprint import VERSION, model_digest

if TYPE_CHECKING:
    from lightning_ptq.module import PTQModule


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


def describe(module: PTQModule) -> dict[str, Any]:
    """What identifies an exported model: plain values."""
    return {
        "lightning_ptq": VERSION,
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
