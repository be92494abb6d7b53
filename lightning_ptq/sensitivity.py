"""What each weight and each activation costs its unit at each number of bits, all else in floating point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ptq.calibration import alone, observe, weight_range
from lightning_ptq.config import QuantConfig
from lightning_ptq.graph.units import Chain
from lightning_ptq.importance import channel_fisher
from lightning_ptq.layers import QuantizedLayer, quantized_layers
from lightning_ptq.losses.base import channels_first
from lightning_ptq.losses.critic import projected
from lightning_ptq.metrics import mi_lower_bound
from lightning_ptq.quantizers import ActQuantizer, float_mode, forget_ranges
from lightning_ptq.ranges import Histogram
from lightning_ptq.store import chunks, run_chunked, widened
from lightning_ptq.weights import WeightQuantizer

BITS = (2, 3, 4, 5, 6, 8)
Kind = Literal["weight", "activation"]


@dataclass(frozen=True)
class Sensitivity:
    """What one tensor does to the network if it alone has `bits` bits, rounded to nearest.

    Attributes:
        name: of the layer whose weight it is, or of the activation's quantizer.
        error: squared error of the network's output for one image, to first order: the unit's error, each channel
            weighted by the squared gradient of the output with respect to it (Fisher information).
        mi_drop: nats that the InfoNCE bound of the mutual information of the unit's output and the teacher's loses.
    """

    name: str
    kind: Kind
    unit: str
    bits: int
    error: float
    mi_drop: float


def sensitivities(
    teacher: Chain,
    student: Chain,
    images: Tensor,
    config: QuantConfig,
    device: torch.device,
    bits: Sequence[int] = BITS,
) -> list[Sensitivity]:
    """Every weight and activation of `student` at every one of `bits`, in the network's order.

    The student must have no ranges yet, and has none afterwards. Costs a pass of one unit for each entry.

    Args:
        images: (N, C, H, W).

    Raises:
        PTQError: what `observe` raises.
    """
    seen = observe(student, images, device, alone)
    fisher = channel_fisher(teacher, images, device, alone)
    found: list[Sensitivity] = []
    x = images
    with float_mode(student):
        for k, name in enumerate(student.names):
            unit, target = student.units[k], run_chunked(teacher.units[k], x, device)
            dim, weights = student.channel_dim(k, target.shape), fisher[k].to(device)
            wanted = torch.cat([projected(channels_first(t.to(device), dim).float()) for t in chunks(target)])
            best = _information(wanted, wanted)
            for kind, tensor, quantizer, layer in quantizers_of(unit):
                for width in bits:
                    with alone_at(width, quantizer, layer, seen, config):
                        noise, rows = _compare(unit, x, target, dim, device)
                    error = float((noise * weights).sum() / len(x))
                    drop = best - _information(rows, wanted)
                    found.append(Sensitivity(tensor, kind, name, width, error, drop))
            x = target
    forget_ranges(student)
    return found


def quantizers_of(
    unit: torch.nn.Module,
) -> Iterator[tuple[Kind, str, WeightQuantizer | ActQuantizer, QuantizedLayer | None]]:
    """(kind, name, quantizer, the layer whose weight it quantizes, if it does) of every quantizer in a unit."""
    layers = dict(quantized_layers(unit))
    for name, module in unit.named_modules():
        if isinstance(module, ActQuantizer):
            yield "activation", name, module, None
        elif name in layers:
            yield "weight", name, layers[name].weight_quantizer, layers[name]


@contextmanager
def alone_at(
    bits: int,
    quantizer: WeightQuantizer | ActQuantizer,
    layer: QuantizedLayer | None,
    seen: Mapping[ActQuantizer, Histogram],
    config: QuantConfig,
) -> Iterator[None]:
    """Inside, `quantizer` has `bits` bits and a range for them, in a network that is in `float_mode` otherwise."""
    before = quantizer.bits
    quantizer.set_bits(bits)
    try:
        if isinstance(quantizer, WeightQuantizer):
            assert layer is not None
            quantizer.set_range(layer.weight, *weight_range(layer.weight, quantizer, config))
        else:
            quantizer.start(seen[quantizer], config.act_range)
        yield
    finally:
        quantizer.set_bits(before)
        quantizer.enabled = False


@torch.no_grad()
def _compare(unit: torch.nn.Module, x: Tensor, target: Tensor, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Squared error of each channel (C,), summed over images and positions, and `projected` outputs (N, D)."""
    noise, rows = list[Tensor](), list[Tensor]()
    for some in chunks(x):
        done = sum(map(len, rows))
        wanted = target[done : done + len(some)].to(device)
        out, wanted = (channels_first(y, dim).float() for y in (unit(widened(some.to(device))), widened(wanted)))
        noise.append((out - wanted).square_().transpose(0, 1).flatten(1).sum(1))
        rows.append(projected(out))
    return torch.stack(noise).sum(0), torch.cat(rows)


def _information(student: Tensor, teacher: Tensor) -> float:
    bound = mi_lower_bound(student, teacher)
    return bound if math.isfinite(bound) else 0.0
