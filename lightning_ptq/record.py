"""What a report shows beyond the summary, taken down while a fit runs and when it ends. Plain values only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ptq.graph import Chain, ChainPair
from lightning_ptq.layers import quantized_layers
from lightning_ptq.metrics import decibels, signal_and_noise
from lightning_ptq.quantizers import ActQuantizer, LogQuantizer
from lightning_ptq.ranges import Histogram
from lightning_ptq.weights import WeightQuantizer

# Raised with every change that an older `report` would misread.
FORMAT = 1
# Bars of a histogram, at most.
BINS = 256
# Points inside a bar at which an activation's quantization error is looked at.
_POINTS = 8
# As many classes are shown one by one; of more, only what was mistaken for what, the most frequent first.
FEW_CLASSES, _SWAPS = 20, 100

# Name of an epoch -> "step" and each loss term -> numbers.
Curves = dict[str, dict[str, list[float]]]


def note(curves: Curves, name: str, step: int, terms: Mapping[str, float]) -> None:
    """Add the loss terms at a step of the epoch called `name`."""
    curve = curves.setdefault(name, {"step": []})
    curve["step"].append(step)
    for term, value in terms.items():
        curve.setdefault(term, []).append(value)


def coarse(seen: Histogram) -> dict[str, Any]:
    """The histogram in `BINS` bars or fewer: `start` of the first, `width` of each, `counts`.

    `zeros` of them are in the bin at zero, where the values of a ReLU are zero as a rule.
    """
    used = seen.counts.nonzero().flatten()
    first, last = int(used[0]), int(used[-1])
    factor = -(-(last - first + 1) // BINS)  # whole bins are put together, so that no count is split
    zeros = seen.counts[-seen.first] if first <= -seen.first <= last else 0
    counts = torch.nn.functional.pad(seen.counts[first : last + 1], (0, -(last - first + 1) % factor))
    return {
        "start": (seen.first + first) * seen.width,
        "width": seen.width * factor,
        "zeros": int(zeros),
        "counts": [int(n) for n in counts.view(-1, factor).sum(1).tolist()],
    }


def quantizer_names(student: Chain) -> dict[ActQuantizer, str]:
    """Every activation quantizer's name in the graph, as plans and mixed precision know it."""
    named = (pair for unit in student.units for pair in unit.named_modules())
    return {module: name for name, module in named if isinstance(module, ActQuantizer)}


def seen_by(student: Chain, histograms: Mapping[ActQuantizer, Histogram]) -> dict[str, dict[str, Any]]:
    """What every activation quantizer was shown when ranges were estimated, by name."""
    return {name: coarse(histograms[q]) for q, name in quantizer_names(student).items() if q in histograms}


@torch.no_grad()
def activation_record(q: ActQuantizer, seen: Mapping[str, Any]) -> dict[str, Any]:
    """What a quantizer was shown, the range that it has now and had at first, and what that does to what was shown.

    `sqnr_db` is of the float network's values; inside a bar they count as spread evenly, but for the zeros.
    """
    points = (torch.arange(len(seen["counts"]) * _POINTS, dtype=torch.float64) + 0.5) / _POINTS
    x = torch.cat([seen["start"] + seen["width"] * points, torch.zeros(1)]).float()
    spread = torch.tensor(seen["counts"], dtype=torch.float64)
    if seen["zeros"]:
        spread[math.floor(-seen["start"] / seen["width"])] -= seen["zeros"]
    counts = torch.cat([spread.repeat_interleave(_POINTS) / _POINTS, torch.tensor([float(seen["zeros"])])])
    error = (q(x.to(q.log_scale.device)).cpu() - x).double()
    (low, high), initial = grid_ends(q, q.scale), grid_ends(q, q.initial_log_scale.exp())
    outside = (x < low) | (x > high)
    return {
        **seen,
        "bits": q.bits,
        "range": [low, high],
        "initial_range": list(initial),
        "levels": 0 if isinstance(q, LogQuantizer) else q.qmax - q.qmin + 1,  # evenly spaced ones
        "clipped_fraction": float(counts[outside].sum() / counts.sum()),
        "sqnr_db": decibels(float((counts * x.double().square()).sum()), float((counts * error.square()).sum())),
    }


def grid_ends(q: ActQuantizer, scale: Tensor) -> tuple[float, float]:
    """The smallest and the largest value that `q` gives with this scale."""
    if isinstance(q, LogQuantizer):
        return 0.0, float(scale)
    return q.low * float(scale), q.high * float(scale)


@torch.no_grad()
def weight_record(weight: Tensor, q: WeightQuantizer) -> dict[str, Any]:
    """A layer's weights in steps of their grid, 0 being zero: as floats, rounded to nearest, and as calibrated.

    `float` counts in bars of 1 / `bars_per_step` from `start` on, `nearest` and `calibrated` at the integers from
    `first` on. `sqnr_db` is of the calibrated weight without its gain.
    """
    weight = weight.float()
    nearest, calibrated = (q.integers(weight, nearest=n) - q.zero_point for n in (True, False))
    both = torch.stack([nearest, calibrated]).long()
    first, last = int(both.min()), int(both.max())
    fine = max(1, min(8, BINS // (last - first + 3)))
    position = ((weight / q.scale).clamp(first - 1, last + 1) - (first - 1)) * fine
    floats = torch.bincount(position.flatten().long(), minlength=(last - first + 2) * fine)
    signal, noise = signal_and_noise(q(weight, gain=False), weight).tolist()
    return {
        "start": first - 1,
        "bars_per_step": fine,
        "float": floats.tolist(),
        "first": first,
        "nearest": torch.bincount((both[0] - first).flatten(), minlength=last - first + 1).tolist(),
        "calibrated": torch.bincount((both[1] - first).flatten(), minlength=last - first + 1).tolist(),
        "flipped_fraction": float((nearest != calibrated).float().mean()),
        "sqnr_db": decibels(signal, noise),
    }


def confusion(codes: Tensor, classes: int, names: Sequence[str] = ()) -> dict[str, Any]:
    """How often which class of the teacher's became which of the student's.

    Args:
        codes: teacher's class * classes + student's class of every image, (N,).
        names: of the classes; as many as there are classes, or they are others'.

    Returns:
        `pairs` of (teacher's class, student's class, images): all of them for a few classes; for many the most frequent
        in which the two differ.
    """
    values, counts = codes.cpu().unique(return_counts=True)
    pairs = [(code // classes, code % classes, n) for code, n in zip(values.tolist(), counts.tolist(), strict=True)]
    if classes > FEW_CLASSES:
        pairs = sorted((pair for pair in pairs if pair[0] != pair[1]), key=lambda pair: (-pair[2], *pair))[:_SWAPS]
    return {
        "classes": classes,
        "names": list(names) if len(names) == classes else [],
        "images": len(codes),
        "pairs": [list(pair) for pair in pairs],
    }


def record(
    chains: ChainPair, epochs: tuple[str, ...], seen: Mapping[str, Any], curves: Curves, confusions: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `record.json`.

    Args:
        epochs: names of all epochs that the run has, done or not. seen: `seen_by` of the student's quantizers.
        confusions: network ("nearest", "student") -> `confusion`; empty where there are no classes.
    """
    student, layers, activations = chains.student, [], {}
    twins = {name: layer for unit in student.units for name, layer in quantized_layers(unit)}
    names = quantizer_names(student)
    bits = {name: q.bits for q, name in names.items()}
    for plan in chains.layers:
        layer = twins[plan.name]
        q = layer.weight_quantizer
        layers.append(
            {
                "name": plan.name,
                "kind": plan.kind,
                "unit": student.names[plan.unit],
                "reads": plan.reads,
                "weight_bits": q.bits,
                "act_bits": bits.get(plan.reads, plan.act_bits),
                "weights": layer.weight.numel(),
                "weight_bytes": math.ceil(layer.weight.numel() * q.bits / 8),
                "grid": weight_record(layer.weight, q) if q.enabled else None,
            }
        )
    for act, name in names.items():
        if act.enabled and name in seen:
            readers = [plan.name for plan in chains.layers if plan.reads == name]
            activations[name] = {"read_by": readers, **activation_record(act, seen[name])}
    return {
        "format": FORMAT,
        "epochs": list(epochs),
        "layers": layers,
        "activations": activations,
        "products": list(chains.products),
        "floats": [{"name": op.name, "reason": op.reason} for op in chains.floats],
        "curves": curves,
        "confusion": dict(confusions),
    }


def plain(value: Any) -> Any:
    """`value` with None in place of infinity and NaN, which JSON lacks, and numbers to seven digits."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
