"""Sensitivities and the Pareto front of mixed precision as text, JSON and a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ptq.allocation import Allocation, allocate
from lightning_ptq.calibration import alone
from lightning_ptq.config import Budget, QuantConfig
from lightning_ptq.equalize import equalize
from lightning_ptq.errors import PTQError
from lightning_ptq.graph import ChainPair
from lightning_ptq.graph.arithmetic import layer_multiply_adds
from lightning_ptq.quantizers import weight_quantizers
from lightning_ptq.sensitivity import BITS, Sensitivity, sensitivities

AVERAGES = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)


def pareto_front(
    chains: ChainPair, images: Tensor, quant: QuantConfig, device: torch.device, learned: bool
) -> tuple[list[Sensitivity], dict[float, Allocation]]:
    """What each tensor costs at each number of bits, and the best mixture for each average; trains nothing.

    Args:
        images: (N, C, H, W) to measure on. learned: the rounding will be learned.

    Raises:
        PTQError: the student has ranges already, or nothing is free to choose.
    """
    if any(q.enabled for q in weight_quantizers(chains.student)):
        raise PTQError("sensitivities are measured before calibration, and this network has ranges already.")
    equalize(chains.student, images, quant, device, alone)
    found = sensitivities(chains.teacher, chains.student, images, quant, device, alone, learned)
    costs = layer_multiply_adds(chains.student, tuple(images.shape[1:]))
    front = {bits: _best(chains, found, costs, bits, quant.budget) for bits in AVERAGES}
    feasible = {bits: best for bits, best in front.items() if best is not None}
    if not feasible:
        raise PTQError("edges and overrides fix so much that nothing is left to choose. Fix less.")
    return found, feasible


def _best(
    chains: ChainPair,
    found: Sequence[Sensitivity],
    costs: Mapping[str, int],
    bits: float,
    budget: Budget,
) -> Allocation | None:
    """The best allocation; None if so few bits are too few for what is fixed."""
    try:
        return allocate(chains.layers, found, costs, bits, budget)
    except PTQError:
        return None


def front_text(found: Sequence[Sensitivity], front: Mapping[float, Allocation], budget: Budget) -> str:
    """Tables: every tensor and every unit at each number of bits, then the front."""
    columns = "".join(f"{f'{bits} bits':>12}" for bits in BITS)
    lines = [
        "Nats by which predictions leave the teacher's if one tensor alone is quantized (squared error of what are no",
        "scores of classes); at 2 bits also its unit's error, carried to the output, and what it loses of information",
        "",
        f"{'tensor':<36} {columns}  {'error':>10} {'MI drop':>8}",
    ]
    by_name: dict[tuple[str, str], dict[int, Sensitivity]] = {}
    for s in found:
        by_name.setdefault((s.kind, s.name), {})[s.bits] = s
    for (_, name), row in by_name.items():
        nats, worst = "".join(f"{row[bits].divergence:>12.4g}" for bits in BITS), row[BITS[0]]
        lines.append(f"{name:<36} {nats}  {worst.error:>10.4g} {worst.mi_drop:>8.3f}")
    lines += ["", f"{'unit, all its tensors':<36} {columns}"]
    for unit in dict.fromkeys(s.unit for s in found):
        sums = (sum(s.divergence for s in found if (s.unit, s.bits) == (unit, bits)) for bits in BITS)
        lines.append(f"{unit:<36} " + "".join(f"{total:>12.4g}" for total in sums))
    price = "bits of both factors, multiplied and averaged" if budget == "bops" else "bits of weights, averaged"
    lines += ["", f"{'average_bits':<14} {'nats':>10}  {price}"]
    lines += [f"{bits:<14g} {best.divergence:>10.4g}  {best.cost:.2f}" for bits, best in front.items()]
    return "\n".join(lines)


def front_data(found: Sequence[Sensitivity], front: Mapping[float, Allocation]) -> dict[str, Any]:
    """The same in plain values, with the bits of every allocation."""
    plain = [asdict(s) for s in found]
    return {
        "sensitivities": [{key: finite(value) for key, value in row.items()} for row in plain],
        "front": [{"average_bits": bits, **asdict(best)} for bits, best in front.items()],
    }


def finite(value: Any) -> Any:
    """`value`, or None in place of what JSON has not: infinity and NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot_front(front: Mapping[float, Allocation], budget: Budget, path: Path) -> None:
    """Divergence against cost, as a PNG."""
    from matplotlib.figure import Figure  # only now: it takes longer to import than the rest of this file

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([best.cost for best in front.values()], [best.divergence for best in front.values()], marker="o")
    for bits, best in front.items():
        axes.annotate(f"{bits:g}", (best.cost, best.divergence), textcoords="offset points", xytext=(5, 5), fontsize=8)
    label = "bit operations a multiply-add" if budget == "bops" else "bits a weight"
    axes.set(xlabel=f"{label} (numbers: average_bits)", ylabel="divergence of predictions, nats", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
