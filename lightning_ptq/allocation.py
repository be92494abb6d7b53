"""Mixed precision: bits of every weight and activation that cost least accuracy within a budget, found exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from lightning_ptq.config import Budget
from lightning_ptq.divergence import Divergences
from lightning_ptq.errors import PTQError
from lightning_ptq.graph import LayerPlan
from lightning_ptq.graph.units import Chain
from lightning_ptq.quantizers import ActQuantizer
from lightning_ptq.sensitivity import BITS, Kind


@dataclass(frozen=True)
class Allocation:
    """Bits for each layer's weight and for each activation quantizer, by name.

    Attributes:
        divergence: the sum of those of the tensors at these bits.
        cost: bits of both factors of a multiply-add, multiplied, on average over the multiply-adds of the layers that
            are free; for a budget of size, bits of a weight on average.
    """

    weights: dict[str, int]
    activations: dict[str, int]
    divergence: float
    cost: float


def choices(layers: Sequence[LayerPlan], budget: Budget) -> set[tuple[Kind, str]]:
    """The tensors whose bits `allocate` chooses; raises `PTQError` if there are none."""
    held, free = _held(layers, budget), _free(layers)
    read: set[tuple[Kind, str]] = {("activation", layer.reads) for layer in free if layer.reads not in held}
    return read | {("weight", layer.name) for layer in free}


def _free(layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The layers whose bits are to be chosen."""
    free = [layer for layer in layers if not layer.fixed]
    if not free:
        raise PTQError("average_bits has nothing to choose: every layer's bits are fixed by edges or overrides.")
    return free


def _held(layers: Sequence[LayerPlan], budget: Budget) -> dict[str, int]:
    """Bits of activations that are not free: one is if all that read it are, and only bit operations pay for it."""
    return {layer.reads: layer.act_bits for layer in layers if layer.fixed or budget == "size"}


def allocate(
    layers: Sequence[LayerPlan],
    found: Divergences,
    multiply_adds: Mapping[str, int],
    average_bits: float,
    budget: Budget,
) -> Allocation:
    """The bits of all layers that are not fixed, with the least sum of divergences within the budget.

    The budget is that of these layers; fixed ones, and products of activations, neither pay nor are paid for. "bops":
    multiply-adds times bits of both factors, at most what `average_bits` bits for everything would take; "size": bits
    of parameters, at most `average_bits` on average, while activations keep theirs. Solved to optimality.

    Args:
        found: `divergences` of the `choices` there are.
        multiply_adds: of each layer for one image.

    Raises:
        PTQError: nothing is free to choose, or no choice is cheap enough.
    """
    free = _free(layers)
    tensors = sorted({layer.reads for layer in free})
    held = _held(layers, budget)
    widths = {name: [held[name]] if name in held else list(BITS) for name in tensors}
    pairs = [(layer, w, a) for layer in free for w in BITS for a in widths[layer.reads]]
    activations = [(name, a) for name in tensors for a in widths[name]]
    count = len(pairs) + len(activations)

    price = [multiply_adds[layer.name] * w * a if budget == "bops" else layer.parameters * w for layer, w, a in pairs]
    unit_price = sum(multiply_adds[layer.name] if budget == "bops" else layer.parameters for layer in free)
    limit = unit_price * average_bits ** (2 if budget == "bops" else 1)
    loss = [found["weight", layer.name, w] for layer, w, _ in pairs]
    loss += [0.0 if name in held else found["activation", name, a] for name, a in activations]

    # One choice for each layer; a layer's choice of activation bits is that of the tensor which it reads.
    rows = lil_matrix((len(free) + len(free) * len(BITS) + len(tensors) + 1, count))
    lower, upper = [], []
    row = 0
    for layer in free:
        mine = [i for i, pair in enumerate(pairs) if pair[0] is layer]
        rows[row, mine] = 1
        lower.append(1.0)
        upper.append(1.0)
        row += 1
        for a in widths[layer.reads]:
            rows[row, [i for i in mine if pairs[i][2] == a]] = 1
            rows[row, len(pairs) + activations.index((layer.reads, a))] = -1
            lower.append(0.0)
            upper.append(0.0)
            row += 1
    for name in tensors:
        rows[row, [len(pairs) + i for i, (tensor, _) in enumerate(activations) if tensor == name]] = 1
        lower.append(1.0)
        upper.append(1.0)
        row += 1
    rows[row, : len(pairs)] = np.array(price) / limit
    lower.append(0.0)
    upper.append(1.0)
    losses = np.array(loss)
    finite = np.isfinite(losses)
    most = max(losses[finite].max(initial=0.0), 1e-30)
    result = milp(
        # What overflows or is NaN is worse than all that is not, together.
        np.where(finite, losses / most, count + 1.0),
        constraints=LinearConstraint(rows[: row + 1].tocsr(), lower, upper),
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise PTQError(
            f"average_bits={average_bits:g} is too little: with what edges and overrides fix, no choice of "
            f"{', '.join(map(str, BITS))} bits is that cheap. Give more, or fix less."
        )
    chosen = result.x > 0.5
    taken = [pair for pair, on in zip(pairs, chosen, strict=False) if on]
    cost = sum(p for p, on in zip(price, chosen, strict=False) if on) / unit_price
    return Allocation(
        {layer.name: w for layer, w, _ in taken},
        {layer.reads: a for layer, _, a in taken},
        float(losses[chosen].sum()),
        float(cost),
    )


def apply(student: Chain, weights: Mapping[str, int], activations: Mapping[str, int]) -> None:
    """Give the named layers' weights and the named activation quantizers these bits; they must have no ranges yet."""
    for name, bits in weights.items():
        layer = student.find(name)
        layer.weight_quantizer.set_bits(bits)  # type: ignore[union-attr,operator]
    for name, bits in activations.items():
        quantizer = student.find(name)
        assert isinstance(quantizer, ActQuantizer)
        quantizer.set_bits(bits)
