"""What a calibration would do, unit by unit, without running anything."""

from __future__ import annotations

from lightning_ptq.allocation import choices
from lightning_ptq.config import QuantConfig
from lightning_ptq.graph import ChainPair
from lightning_ptq.graph.arithmetic import multiply_adds
from lightning_ptq.memory import CacheSizes, unit_shapes
from lightning_ptq.network import NETWORK
from lightning_ptq.quantizers import LogQuantizer, act_quantizers
from lightning_ptq.sensitivity import Kind
from lightning_ptq.store import CacheType


def plan_text(
    chains: ChainPair,
    quant: QuantConfig,
    image_shape: tuple[int, ...],
    samples: int,
    network: bool = False,
    part: str | None = None,
    dtype: CacheType = "float32",
) -> str:
    """One line for each unit with shapes, parameters and cache size, one for each layer, and what stays float.

    Bits that are yet to be chosen are "?". `network` adds the epoch of the whole network, which has no layers of its
    own. Where but a `part` of a model is quantized, `image_shape` is that of what it reads.
    """
    open_bits = set[tuple[Kind, str]]() if quant.average_bits is None else choices(chains.layers, quant.budget)
    shapes = unit_shapes(chains.teacher, image_shape)
    sizes = CacheSizes.of(chains.teacher, shapes, samples, dtype)
    lines = [
        *([f"of the model, the part {part!r} only: all around it stays in floating point"] if part else []),
        f"{len(chains.student)} units for {samples} calibration images of shape {_shape(shapes[0])}, "
        f"W{quant.weight_bits}A{quant.act_bits}, edges {quant.edges}, placement {quant.placement}",
        "",
        f"{'unit':<32} {'output':>15} {'parameters':>12} {'cache MiB':>10}",
    ]
    for k, name in enumerate(chains.student.names):
        layers = [layer for layer in chains.layers if layer.unit == k]
        title = f"{k + 1:>3}  {name}"
        parameters = sum(layer.parameters for layer in layers)
        lines.append(f"{title:<32} {_shape(shapes[k + 1]):>15} {parameters:>12,} {sizes.units[k] / 2**20:>10.1f}")
        for layer in layers:
            weight_bits = "?" if ("weight", layer.name) in open_bits else layer.weight_bits
            act_bits = "?" if ("activation", layer.reads) in open_bits else layer.act_bits
            bits = f"W{weight_bits} A{act_bits}"
            lines.append(f"       {layer.name:<36} {layer.kind:<13} {bits} {layer.parameters:>12,}")
    if network:
        title = f"{len(chains.student) + 1:>3}  {NETWORK}"
        lines.append(f"{title:<32} {_shape(shapes[-1]):>15} {0:>12,} {sizes.network / 2**20:>10.1f}")
    if quant.average_bits is not None:
        lines += ["", f"bits that are '?' are chosen when a fit starts, {quant.average_bits:g} on average"]
    quantized, total = multiply_adds(chains.student, image_shape)
    of = "the part's " if part else ""
    lines += ["", f"{100 * quantized / max(total, 1):.2f} % of {of}{total:,} multiply-adds for one image are quantized"]
    if chains.products:
        lines += [
            f"products of activations, A{quant.act_bits} unless overridden:",
            *(f"  {n}" for n in chains.products),
        ]
    if any(isinstance(q, LogQuantizer) for q in act_quantizers(chains.student)):
        lines.append("softmax on a grid of powers of two: simulation only")
    if chains.student.image_shape is not None:
        lines.append(f"captured by torch.export, for images of shape {_shape(chains.student.image_shape)} only")
    lines += ["", "stays in floating point:"]
    lines += [f"  {op.name}: {op.reason}" for op in chains.floats] or [
        f"  nothing with parameters{' in that part' if chains.student.is_part else ''}"
    ]
    return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
