"""What identifies a run: the model's weights, the settings and the calibration images. Resuming checks all three.

What else decides its last bits is where it ran.
"""

from __future__ import annotations

import hashlib
import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.errors import PTQError
from lightning_ptq.kernels import kernels_for

VERSION = version("lightning-ptq")


def model_digest(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and values of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # As bytes: numpy, which hashes without a copy, has no bfloat16.
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def data_digest(images: Tensor) -> int:
    """Sum modulo 2**62 of a hash of every image (N, C, H, W) and its place: steps and judgement go by the order."""
    total = 0
    for place, image in enumerate(images):
        content = place.to_bytes(8, "little") + image.cpu().contiguous().numpy().tobytes()
        total += int.from_bytes(hashlib.sha256(content).digest()[:7], "little")
    return total % 2**62


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, kernels and threads: with the same of all, a run gives the same bits again."""
    cuda = device.type == "cuda"
    return {
        "lightning_ptq": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchvision", "lightning")},
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "compiled_kernels": getattr(kernels_for(torch.empty(0, device=device)), "VERSION", None),
        "threads": torch.get_num_threads(),
    }


def check_same(saved: Mapping[str, Any], live: Mapping[str, Any], what: str, allow_drift: bool = False) -> None:
    """Refuse a checkpoint that differs from the module that loads it, naming every setting in which it does."""
    different = [
        f"{key}={saved.get(key)!r} in the checkpoint, {live.get(key)!r} here"
        for key in sorted({*saved, *live})
        if saved.get(key) != live.get(key)
    ]
    if different:
        refuse(
            f"the checkpoint has another {what}: {'; '.join(different)}. Use the settings of its config.yaml",
            allow_drift,
        )


def layer_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the quantized layers' weights by name, in the order of a `PTQModule`'s state dict.

    The same for every method and number of bits: which unit a layer belongs to is left out.
    """
    layers = (key for key in state if f"{key}_quantizer.ready" in state)
    return {key.removeprefix("student.units.").partition(".")[2]: tuple(state[key].shape) for key in layers}


def check_architecture(
    saved: Mapping[str, Tensor], live: Mapping[str, Tensor], saved_name: str, live_name: str
) -> None:
    """Refuse the checkpoint of another network, by the two state dicts: it could not be loaded, whatever is allowed."""
    there, here = layer_shapes(saved), layer_shapes(live)
    if there == here:
        return
    first = next(key for key in (*here, *there) if here.get(key) != there.get(key)).removesuffix(".weight")
    shapes = " and ".join(_shape(shapes.get(f"{first}.weight")) for shapes in (there, here))
    raise PTQError(
        f"the checkpoint belongs to another model: {saved_name} with {len(there)} quantized layers, and this is "
        f"{live_name} with {len(here)}. The first that differs is {first!r}: {shapes}. Give the model that it was "
        "calibrated from, or this model's checkpoint."
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else "x".join(map(str, shape))


def check_version(saved: str, allow_drift: bool = False) -> None:
    """Refuse what another major version of this library wrote: it may mean something else by the same numbers."""
    if saved.split(".")[0] != VERSION.split(".")[0]:
        refuse(
            f"the checkpoint is of lightning_ptq {saved}, and this is {VERSION}: another major version. Install that",
            allow_drift,
        )


def refuse(message: str, allow_drift: bool) -> None:
    """Raise `PTQError`, or warn in the same words where the user allows drift."""
    if not allow_drift:
        raise PTQError(f"{message}. Experts go on all the same with allow_drift=True (--model.allow_drift true).")
    warnings.warn(f"{message}. Going on: allow_drift=True.", stacklevel=3)
