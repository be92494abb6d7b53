"""The packed checkpoint `model.ptq`: a quantized network in as many bytes as its bits promise, safe to load.

A safetensors file. Weights are one stream of bits, layer after layer; scales, zero points and biases are one tensor
each; what stays in floating point has its own name. Metadata hold the settings that rebuild the network from the
model's code, and a SHA-256 over all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_ptq.allocation import apply
from lightning_ptq.config import QuantConfig
from lightning_ptq.errors import PTQError
from lightning_ptq.export.check import check_exportable, describe
from lightning_ptq.files import write_whole
from lightning_ptq.graph import Chain, build_chain
from lightning_ptq.layers import quantized_layers
from lightning_ptq.quantizers import act_quantizers

if TYPE_CHECKING:
    from lightning_ptq.module import PTQModule

# Raised with every change that an older reader would misread.
FORMAT = 1
_STREAM, _SCALE, _ZERO, _BIAS = "weights", "weight_scale", "weight_zero_point", "bias"
_ACT_SCALE, _ACT_ZERO = "act_log_scale", "act_zero_point"
_PACKED = (_STREAM, _SCALE, _ZERO, _BIAS, _ACT_SCALE, _ACT_ZERO)


def save_packed(module: PTQModule, path: str | Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write a calibrated module's student, bit-packed.

    Args:
        path: where to write; a file that is there is kept unless `overwrite`.

    Returns:
        Bytes of each part of the file: "weights", "scales", "biases", "activations", "floats" and "header".

    Raises:
        PTQError: a file that exists, a module that is not fully calibrated, or of which only a part is quantized.
    """
    path = Path(path)
    if module.surroundings is not None:
        raise PTQError(
            f"a packed file holds a whole network, and of this one only {module.surroundings.part!r} is quantized. "
            "Export that to .onnx or .pt2, or keep the checkpoint."
        )
    check_exportable(module, path, overwrite)
    tensors = packed_tensors(module.student)
    metadata = describe(module) | {
        "format": FORMAT,
        "quant": module.quant.to_dict(),
        "granularity": module.method.granularity,
        "image_shape": module.student.image_shape,
        "bits": module.session.bits,
        "leaf_modules": list(module.leaf_modules),
    }
    told = json.dumps(metadata, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = save(tensors, {"lightning_ptq": told, "sha256": digest(tensors, told)})
    write_whole(path, lambda to: to.write_bytes(written))

    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    parts = {
        "weights": sizes[_STREAM],
        "scales": sizes[_SCALE] + sizes[_ZERO],
        "biases": sizes[_BIAS],
        "activations": sizes[_ACT_SCALE] + sizes[_ACT_ZERO],
        "floats": sum(size for name, size in sizes.items() if name not in _PACKED),
    }
    return parts | {"header": path.stat().st_size - sum(parts.values())}


def load_packed(path: str | Path, model: nn.Module) -> Chain:
    """The quantized network of a packed file, ready to run: (N, C, H, W) -> what the model returns.

    Nothing in the file is executed. The result is bit-equal to the student that was saved.

    Args:
        model: made by the same code as the one that was calibrated, with whatever weights, which stay; it is put in
            eval mode.

    Raises:
        PTQError: no packed file, one that is damaged or was changed, of a later version, or of another model.
    """
    tensors, metadata = read(Path(path))
    try:
        student = build_chain(
            model.eval(),
            QuantConfig(**metadata["quant"]),
            metadata["granularity"],
            leaf_modules=metadata["leaf_modules"],
            image_shape=metadata["image_shape"],
        ).student
        if metadata["bits"] is not None:
            apply(student, metadata["bits"]["weights"], metadata["bits"]["activations"])
    except (KeyError, TypeError, AttributeError) as error:
        raise PTQError(f"{str(path)!r} holds settings that save_packed does not write: {error!r}.") from None
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed_tensors(student).items()}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise PTQError(
            f"{str(path)!r} is of another model ({metadata['model']}): {', '.join(map(repr, wrong[:4]))} "
            f"{'differs' if len(wrong) == 1 else 'differ'}. Give a model made by the code that was calibrated."
        )
    fill(student, tensors)
    return student


@torch.no_grad()
def packed_tensors(student: Chain) -> dict[str, Tensor]:
    """What a packed file holds of a student, by name; on the CPU."""
    streams, scales, zeros, biases = [], [], [], []
    for layer in layers_of(student):
        q, weight = layer.weight_quantizer, layer.weight
        integers = q.integers(weight) - q.qmin if q.enabled else torch.zeros_like(weight)
        streams.append(pack_bits(integers.to(torch.uint8).flatten().cpu(), q.bits))
        scales.append(q.effective_scale.flatten())
        zeros.append((q.zero_point.flatten() - q.qmin).to(torch.uint8))
        bias = q.correct(layer._parameters["bias"])
        biases.append(weight.new_zeros(weight.shape[0]) if bias is None else bias)
    acts = act_quantizers(student)
    tensors = {
        _STREAM: torch.cat(streams),
        _SCALE: torch.cat(scales),
        _ZERO: torch.cat(zeros),
        _BIAS: torch.cat(biases),
        _ACT_SCALE: torch.stack([q.log_scale for q in acts]),
        _ACT_ZERO: torch.stack([q.zero_point for q in acts]).to(torch.int32),
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors | floats_of(student)).items()}


@torch.no_grad()
def fill(student: Chain, tensors: Mapping[str, Tensor]) -> None:
    """Give a student of the same structure what a packed file holds."""
    stream, channels, outputs = 0, 0, 0
    for layer in layers_of(student):
        q, weight = layer.weight_quantizer, layer.weight
        size, count = packed_size(weight.numel(), q.bits), q.scale.numel()
        integers = unpack_bits(tensors[_STREAM][stream : stream + size], q.bits, weight.numel()).view_as(weight)
        scale = tensors[_SCALE][channels : channels + count].view_as(q.scale)
        zero = tensors[_ZERO][channels : channels + count].view_as(q.scale).float() + q.qmin
        # Rounded to nearest on its own grid, a weight gives its integer again.
        layer.weight = nn.Parameter((integers.float() + q.qmin - zero) * scale, requires_grad=False)
        layer.bias = nn.Parameter(tensors[_BIAS][outputs : outputs + len(weight)].clone(), requires_grad=False)
        q.set_range(layer.weight, scale, zero)
        stream, channels, outputs = stream + size, channels + count, outputs + len(weight)
    for q, log_scale, zero_point in zip(act_quantizers(student), tensors[_ACT_SCALE], tensors[_ACT_ZERO], strict=True):
        q.set_range(log_scale.exp(), zero_point.float())
        q.log_scale.copy_(log_scale)  # exp and log would lose a bit
    for name, tensor in floats_of(student).items():
        tensor.copy_(tensors[name])


def layers_of(student: Chain) -> Iterator[Any]:
    """Quantized layers in the order of the units."""
    for unit in student.units:
        yield from (layer for _, layer in quantized_layers(unit))


def floats_of(student: Chain) -> dict[str, Tensor]:
    """What is neither a quantized layer's nor a quantizer's, by its qualified name."""
    found: dict[str, Tensor] = {}
    for unit in student.units:
        owned = [f"{name}." for name, _ in quantized_layers(unit)]
        owned += [f"{name}." for name, m in unit.named_modules() if m in act_quantizers(unit)]
        for name, tensor in unit.state_dict().items():
            if not name.startswith(tuple(owned)):
                found[f"float.{name}"] = tensor
    return found


def packed_size(count: int, bits: int) -> int:
    """Bytes that so many integers take."""
    return -(-count * bits // 8)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers below 2**bits, uint8 (n,), as a stream of bits, lowest first: uint8 (ceil(n * bits / 8),)."""
    places = torch.arange(bits, dtype=torch.uint8)
    stream = (values[:, None] >> places & 1).flatten()  # (n * bits,)
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """`pack_bits` undone: uint8 (count,)."""
    ones = (stream[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: count * bits].view(count, bits)
    return (ones << torch.arange(bits, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def digest(tensors: Mapping[str, Tensor], metadata: str) -> str:
    """SHA-256 over metadata, names, types, shapes and bytes."""
    total = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a packed file, checked against its SHA-256."""
    if not path.is_file():
        raise PTQError(f"{str(path)!r} is no file. Give what save_packed wrote.")
    try:
        with safe_open(str(path), framework="pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PTQError(
            f"{str(path)!r} is damaged or no packed file: {error}. Write it anew with save_packed."
        ) from None
    if set(told) != {"lightning_ptq", "sha256"}:
        raise PTQError(f"{str(path)!r} is a safetensors file, but not one that save_packed wrote.")
    if digest(tensors, told["lightning_ptq"]) != told["sha256"]:
        raise PTQError(f"{str(path)!r} was changed after it was written: its SHA-256 differs. Get it again.")
    metadata: dict[str, Any] = json.loads(told["lightning_ptq"])
    if metadata["format"] != FORMAT:
        raise PTQError(
            f"{str(path)!r} has format {metadata['format']}, and this version of lightning_ptq reads {FORMAT}. "
            f"It was written by {metadata['lightning_ptq']}."
        )
    return tensors, metadata
