"""Sensitivities and the Pareto front of mixed precision as text, JSON and a plot."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ptq.allocation import Allocation, allocate, choices
from lightning_ptq.calibration import RANGE_IMAGES, alone
from lightning_ptq.config import Budget, QuantConfig
from lightning_ptq.divergence import Divergences, divergences
from lightning_ptq.equalize import equalize
from lightning_ptq.errors import PTQError
from lightning_ptq.graph import ChainPair
from lightning_ptq.graph.arithmetic import counts_of
from lightning_ptq.quantizers import weight_quantizers
from lightning_ptq.sensitivity import BITS, Sensitivity, sensitivities

AVERAGES = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
# What `Allocation.cost` is: in a table, and at an axis.
_COSTS: dict[Budget, tuple[str, str]] = {
    "bops": ("bits of both factors, multiplied and averaged", "bit operations a multiply-add"),
    "memory": ("bits of weights and activations, averaged", "bits a weight or activation"),
    "size": ("bits of weights, averaged", "bits a weight"),
}


@dataclass(frozen=True)
class Front:
    """What each tensor costs, and what is best for each average.

    Attributes:
        sensitivities, divergences: of every tensor at every number of bits.
        best: average bits -> the best mixture.
        budget: what an average is one of. learned: weights will be rounded by learning.
        readers: name of an activation's quantizer -> the layers that read it, by which `overrides` give its bits.
        given: layers of whose bits `edges` or `overrides` give some.
    """

    sensitivities: list[Sensitivity]
    divergences: Divergences
    best: dict[float, Allocation]
    budget: Budget
    learned: bool
    readers: dict[str, list[str]]
    given: tuple[str, ...] = ()


def pareto_front(
    chains: ChainPair,
    images: Tensor,
    quant: QuantConfig,
    device: torch.device,
    learned: bool,
    say: Callable[[str], object] = str,
) -> Front:
    """Measure what each tensor costs at each number of bits, and find the best mixtures; trains nothing.

    Args:
        images: (N, C, H, W) to measure on; what is only shown next to the cost is measured on as many as ranges are.
        learned: the rounding will be learned. say: is told how long it takes.

    Raises:
        PTQError: the student has ranges already, or nothing is free to choose.
    """
    teacher, student = chains.teacher, chains.student
    if any(q.enabled for q in weight_quantizers(student)):
        raise PTQError("sensitivities are measured before calibration, and this network has ranges already.")
    choices(chains.layers, quant.budget)  # raises before the long work
    some = images[:RANGE_IMAGES]
    equalize(student, some, quant, device, alone)
    found = sensitivities(teacher, student, some, quant, device)
    lost = divergences(teacher, student, images, quant, device, alone, learned, say=say)
    counts = counts_of(student, tuple(images.shape[1:]))
    best = {bits: allocate(chains.layers, lost, counts, bits, quant.budget) for bits in AVERAGES}
    readers: dict[str, list[str]] = {}
    for layer in chains.layers:
        readers.setdefault(layer.reads, []).append(layer.name)
    given = tuple(layer.name for layer in chains.layers if layer.fixed)
    return Front(found, lost, best, quant.budget, learned, readers, given)


def front_text(front: Front) -> str:
    """Tables: every tensor and every unit at each number of bits, then the best mixtures."""
    columns = "".join(f"{f'{bits} bits':>12}" for bits in BITS)
    share = ["(a weight: with the share of its rounding error that learning leaves to count)."] if front.learned else []
    lines = [
        "Divergence of the output from the teacher's if one tensor alone is quantized",
        *share,
        "At 2 bits rounded to nearest: its unit's error, carried to the output, and the drop of information in nats.",
        "'into' a layer is the activation that it reads, its act_bits; +1: one more layer reads it.",
        "",
        f"{'tensor':<36} {columns}  {'error':>10} {'MI drop':>8}",
    ]
    for s in front.sensitivities:
        if s.bits == BITS[0]:
            lost = "".join(f"{front.divergences[s.kind, s.name, bits]:>12.4g}" for bits in BITS)
            lines.append(f"{_label(front, s):<36} {lost}  {s.error:>10.4g} {s.mi_drop:>8.3f}")
    lines += ["", f"{'unit, all its tensors':<36} {columns}"]
    for unit in dict.fromkeys(s.unit for s in front.sensitivities):
        own = [(s.kind, s.name) for s in front.sensitivities if (s.unit, s.bits) == (unit, BITS[0])]
        sums = (sum(front.divergences[kind, name, bits] for kind, name in own) for bits in BITS)
        lines.append(f"{unit:<36} " + "".join(f"{total:>12.4g}" for total in sums))
    lines += ["", f"{'average_bits':<14} {'divergence':>10}  {_COSTS[front.budget][0]}"]
    lines += [f"{bits:<14g} {best.divergence:>10.4g}  {best.cost:.2f}" for bits, best in front.best.items()]
    if front.given:
        more = f" and {len(front.given) - 3} more" if len(front.given) > 3 else ""
        lines.append(f"Bits that edges or overrides give are not chosen, and count: {', '.join(front.given[:3])}{more}")
    return "\n".join(lines)


def _label(front: Front, tensor: Sensitivity) -> str:
    """What a user calls the tensor: a layer for its weight, the first layer that reads it for an activation."""
    layers = front.readers.get(tensor.name, []) if tensor.kind == "activation" else []
    if not layers:
        return tensor.name
    return f"into {layers[0]}" + (f" +{len(layers) - 1}" if len(layers) > 1 else "")


def front_data(front: Front) -> dict[str, Any]:
    """The same in plain values, with the bits of every allocation."""
    rows = [
        asdict(s)
        | {"divergence": front.divergences[s.kind, s.name, s.bits]}
        | ({"read_by": front.readers.get(s.name, [])} if s.kind == "activation" else {})
        for s in front.sensitivities
    ]
    best = [{"average_bits": bits, **asdict(best)} for bits, best in front.best.items()]
    return {"sensitivities": _plain(rows), "front": _plain(best)}


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: finite(value) for key, value in row.items()} for row in rows]


def finite(value: Any) -> Any:
    """`value`, or None in place of what JSON has not: infinity and NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot_front(front: Front, path: Path) -> None:
    """Divergence against cost, as a PNG."""
    from matplotlib.figure import Figure  # only now: it takes longer to import than the rest of this file

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes, best = figure.subplots(), front.best.values()
    axes.plot([b.cost for b in best], [b.divergence for b in best], marker="o")
    for bits, b in front.best.items():
        axes.annotate(f"{bits:g}", (b.cost, b.divergence), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xlabel=f"{_COSTS[front.budget][1]} (numbers: average_bits)", ylabel="sum of divergences")
    if any(b.divergence > 0 for b in best):  # an untrained network may lose nothing
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
