"""What each weight and each activation costs at each number of bits, all else in floating point.

The divergence of the network's predictions is measured, behind all units; it is what mixed precision goes by. The error
is that of the unit, carried to the output to first order by Fisher information.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ptq.calibration import Gather, observe, weight_range
from lightning_ptq.config import QuantConfig
from lightning_ptq.graph.units import Chain
from lightning_ptq.importance import channel_fisher
from lightning_ptq.layers import quantized_layers
from lightning_ptq.losses.base import channels_first
from lightning_ptq.losses.critic import projected
from lightning_ptq.losses.prediction import prediction_errors
from lightning_ptq.losses.reconstruction import squared_errors
from lightning_ptq.metrics import has_scores, mi_lower_bound
from lightning_ptq.quantizers import ActQuantizer, float_mode, forget_ranges
from lightning_ptq.store import Store, chunks, run_chunked, widened
from lightning_ptq.weights import WeightQuantizer

BITS = (2, 3, 4, 8)
# Share of a weight's squared error that counts where its rounding will be learned, at each number of bits. Less than
# learning it alone leaves (0.5, 0.6, 0.7, 0.9: `python -m benchmarks.rounding_gain`), since corrections and the last
# epoch take more from weights than from activations. With 3 bits on average, twice as much, half as much and what
# learning leaves all gave a worse ResNet-20 on calibration images that were not learned from (docs/accuracy.md).
LEARNED = {2: 0.05, 3: 0.1, 4: 0.15, 8: 1.0}


@dataclass(frozen=True)
class Sensitivity:
    """What one tensor does to the network if it alone has `bits` bits, rounded to nearest.

    Attributes:
        name: of the layer whose weight it is, or of the activation's quantizer.
        divergence: nats by which the network's predictions leave the teacher's, mean over images (`prediction_loss`);
            squared error of an output that has no scores of classes. Of a weight whose rounding will be learned, with
            as much of its error as that leaves (`LEARNED`).
        error: squared error of the network's output for one image, to first order: the unit's error, each channel
            weighted by the squared gradient of the output with respect to it (Fisher information).
        mi_drop: nats that the InfoNCE bound of the mutual information of the unit's output and the teacher's loses.
    """

    name: str
    kind: Literal["weight", "activation"]
    unit: str
    bits: int
    divergence: float
    error: float
    mi_drop: float


def sensitivities(
    teacher: Chain,
    student: Chain,
    images: Tensor,
    config: QuantConfig,
    device: torch.device,
    gather: Gather,
    learned: bool,
    bits: Sequence[int] = BITS,
    store: Store | None = None,
) -> list[Sensitivity]:
    """Every weight and activation of `student` at every one of `bits`, in the network's order.

    The student must have no ranges yet, and has none afterwards. Costs a pass of one unit and one from there to the end
    for each entry.

    Args:
        images: (N, C, H, W) of this process. gather: tensor -> that tensor of every process.
        learned: weights will be rounded by learning, not to nearest.
        store: for one unit's input and output, and the network's; None takes where the images lie.

    Raises:
        PTQError: what `observe` raises.
    """
    seen = observe(student, images, device, gather)
    fisher = channel_fisher(teacher, images, device, gather)
    final = run_chunked(teacher, images, device, store)
    found: list[Sensitivity] = []
    x = images
    with float_mode(student):
        for k, name in enumerate(student.names):
            unit, target = student.units[k], run_chunked(teacher.units[k], x, device, store)
            dim, weights = student.channel_dim(k, target.shape), fisher[k].to(device)
            wanted = torch.cat([projected(channels_first(t.to(device), dim).float()) for t in chunks(target)])
            best = _information(wanted, wanted, gather)
            for tensor, quantizer, layer in _quantizers(unit):
                for width in bits:
                    with _alone(quantizer, width):
                        if isinstance(quantizer, WeightQuantizer):
                            assert layer is not None
                            quantizer.set_range(layer, *weight_range(layer, quantizer, config))
                        else:
                            quantizer.start(seen[quantizer], config.act_range)
                        noise, rows = _compare(unit, x, target, dim, device)
                        with _as_learned(quantizer, layer) if learned and layer is not None else nullcontext():
                            nats = _divergence(student, teacher, k, x, final, device)
                    divergence, error = (float(_mean(v, gather)) for v in (nats, (noise * weights).sum() / len(x)))
                    drop = best - _information(rows, wanted, gather)
                    kind: Literal["weight", "activation"] = "activation" if layer is None else "weight"
                    found.append(Sensitivity(tensor, kind, name, width, divergence, error, drop))
            x = target
    forget_ranges(student)
    return found


def _quantizers(unit: torch.nn.Module) -> Iterator[tuple[str, WeightQuantizer | ActQuantizer, Tensor | None]]:
    """(name, quantizer, its weight) of every quantizer in a unit; activations have no weight."""
    layers = dict(quantized_layers(unit))
    for name, module in unit.named_modules():
        if isinstance(module, ActQuantizer):
            yield name, module, None
        elif name in layers:
            yield name, layers[name].weight_quantizer, layers[name].weight


@contextmanager
def _alone(quantizer: WeightQuantizer | ActQuantizer, bits: int) -> Iterator[None]:
    """Inside, `quantizer` has `bits` bits and can be given a range."""
    before = quantizer.bits
    quantizer.set_bits(bits)
    try:
        yield
    finally:
        quantizer.set_bits(before)
        quantizer.enabled = False


@contextmanager
def _as_learned(quantizer: WeightQuantizer | ActQuantizer, weight: Tensor) -> Iterator[None]:
    """Inside, `weight` is off by what learning its rounding leaves, in place of what its quantizer makes of it."""
    before, share = weight.data, LEARNED[quantizer.bits]
    weight.data = torch.lerp(before, quantizer(before), share**0.5)
    quantizer.enabled = False
    try:
        yield
    finally:
        weight.data, quantizer.enabled = before, True


@torch.no_grad()
def _divergence(student: Chain, teacher: Chain, k: int, x: Tensor, final: Tensor, device: torch.device) -> Tensor:
    """Mean over images of what the predictions lose if the student's unit `k` reads x (N, ...), shape ()."""
    comparable = has_scores(final) and not student.is_part
    lost, errors = list[Tensor](), prediction_errors if comparable else squared_errors
    for some in chunks(x):
        done = sum(map(len, lost))
        out = teacher(student.units[k](widened(some.to(device))), start=k + 1)
        lost.append(errors(out, final[done : done + len(some)].to(device)))
    return torch.cat(lost).mean()


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


def _information(student: Tensor, teacher: Tensor, gather: Gather) -> float:
    student, teacher = (torch.cat(list(gather(rows))) for rows in (student, teacher))
    bound = mi_lower_bound(student, teacher)
    return bound if math.isfinite(bound) else 0.0


def _mean(x: Tensor, gather: Gather) -> Tensor:
    return torch.stack(list(gather(x))).mean(0)
