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

# A layer with bits of its weight and of what it reads.
Pair = tuple[LayerPlan, int, int]


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
    pairs: list[Pair] = [(layer, w, a) for layer in free for w in BITS for a in widths[layer.reads]]
    activations = [(name, a) for name in tensors for a in widths[name]]

    price = [multiply_adds[layer.name] * w * a if budget == "bops" else layer.parameters * w for layer, w, a in pairs]
    unit_price = sum(multiply_adds[layer.name] if budget == "bops" else layer.parameters for layer in free)
    limit = unit_price * average_bits ** (2 if budget == "bops" else 1)
    loss = [found["weight", layer.name, w] for layer, w, _ in pairs]
    loss += [0.0 if name in held else found["activation", name, a] for name, a in activations]

    within = np.append(np.array(price) / limit, np.zeros(len(activations)))
    chosen = _least(np.array(loss), [_consistent(pairs, activations), LinearConstraint(within, 0.0, 1.0)])
    if chosen is None:
        raise PTQError(
            f"average_bits={average_bits:g} is too little: with what edges and overrides fix, no choice of "
            f"{', '.join(map(str, BITS))} bits is that cheap. Give more, or fix less."
        )
    taken = [pair for pair, on in zip(pairs, chosen, strict=False) if on]
    cost = sum(p for p, on in zip(price, chosen, strict=False) if on) / unit_price
    return Allocation(
        {layer.name: w for layer, w, _ in taken},
        {layer.reads: a for layer, _, a in taken},
        float(np.array(loss)[chosen].sum()),
        float(cost),
    )


def _consistent(pairs: Sequence[Pair], activations: Sequence[tuple[str, int]]) -> LinearConstraint:
    """One choice for each layer and each tensor, and a layer's activation bits are those of the tensor it reads.

    Variables are whether each pair is chosen, then whether each tensor has these bits.
    """
    layers: dict[str, list[int]] = {}
    for i, (layer, _, _) in enumerate(pairs):
        layers.setdefault(layer.name, []).append(i)
    tensors: dict[str, list[int]] = {}
    for j, (tensor, _) in enumerate(activations, start=len(pairs)):
        tensors.setdefault(tensor, []).append(j)
    # The sum of some variables is 1, or equals the one variable of a tensor's bits.
    rows: list[tuple[list[int], int | None]] = [(each, None) for each in (*layers.values(), *tensors.values())]
    for mine in layers.values():
        choices_of_tensor = tensors[pairs[mine[0]][0].reads]
        rows += [([i for i in mine if pairs[i][2] == activations[j - len(pairs)][1]], j) for j in choices_of_tensor]
    matrix = lil_matrix((len(rows), len(pairs) + len(activations)))
    for row, (added, equal_to) in enumerate(rows):
        matrix[row, added] = 1.0
        if equal_to is not None:
            matrix[row, equal_to] = -1.0
    total = np.array([float(equal_to is None) for _, equal_to in rows])
    return LinearConstraint(matrix.tocsr(), total, total)


def _least(losses: np.ndarray, constraints: list[LinearConstraint]) -> np.ndarray | None:
    """Which of the variables, each 0 or 1, to choose for the least sum of losses; None if no choice is allowed."""
    finite = np.isfinite(losses)
    most = max(losses[finite].max(initial=0.0), 1e-30)
    result = milp(
        # What overflows or is NaN is worse than all that is not, together.
        np.where(finite, losses / most, len(losses) + 1.0),
        constraints=constraints,
        integrality=np.ones(len(losses)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    return None if result.x is None else result.x > 0.5


def apply(student: Chain, weights: Mapping[str, int], activations: Mapping[str, int]) -> None:
    """Give the named layers' weights and the named activation quantizers these bits; they must have no ranges yet."""
    for name, bits in weights.items():
        layer = student.find(name)
        layer.weight_quantizer.set_bits(bits)  # type: ignore[union-attr,operator]
    for name, bits in activations.items():
        quantizer = student.find(name)
        assert isinstance(quantizer, ActQuantizer)
        quantizer.set_bits(bits)
