"""What a fit's checkpoint says of the module that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_ptq.config import QuantConfig
from lightning_ptq.errors import PTQError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint, on the CPU, read without running code from the file.

    Raises:
        PTQError: no file, a damaged one, or one that no fit wrote.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PTQError(f"ckpt_path={str(path)!r} can't be read: {error}. Give a fit's checkpoints/last.ckpt.") from None
    return checked_checkpoint(checkpoint, f"ckpt_path={str(path)!r}")


def checked_checkpoint(checkpoint: dict[str, Any], name: str = "the checkpoint") -> dict[str, Any]:
    """The same, unless no module of this library wrote it.

    Raises:
        PTQError: another program's checkpoint.
    """
    if not isinstance(checkpoint, dict) or "lightning_ptq" not in checkpoint:
        raise PTQError(f"{name} was not written by lightning_ptq. Give a fit's checkpoints/last.ckpt.")
    return checkpoint


def arguments_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the `PTQModule` that wrote a checkpoint: those that decide what it can load, all but the model.

    Raises:
        PTQError: the checkpoint lacks them.
    """
    try:
        told: dict[str, Any] = checkpoint["lightning_ptq"]
        quant, settings = dict(told["structure"]), told["settings"]
        module = {key: quant.pop(key) for key in ("granularity", "rounding")}
        module["part"] = quant.pop("part", "")  # "": not even the part that would be quantized by default
        module |= {key: settings[key] for key in ("method", "steps_per_unit", "network_steps")}
        return module | dict(told.get("built", {})) | {"quant": QuantConfig(**quant)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PTQError):
            raise
        raise PTQError(f"the checkpoint's settings are not those of lightning_ptq: {error!r}.") from None
