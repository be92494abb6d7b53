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
from lightning_ptq.graph.arithmetic import Counts
from lightning_ptq.graph.units import Chain
from lightning_ptq.quantizers import ActQuantizer
from lightning_ptq.sensitivity import BITS, Kind

# A layer with bits of its weight and of what it reads.
Pair = tuple[LayerPlan, int, int]


@dataclass(frozen=True)
class Allocation:
    """Bits of the weights and the activation quantizers that were chosen, by name of layer and of quantizer.

    Attributes:
        divergence: the sum of those of the tensors at these bits.
        cost: what all quantized layers take, as an average: over multiply-adds of the bits of both factors, multiplied
            ("bops"), over weights and activations of their bits ("memory"), or over weights ("size").
    """

    weights: dict[str, int]
    activations: dict[str, int]
    divergence: float
    cost: float


def choices(layers: Sequence[LayerPlan], budget: Budget) -> set[tuple[Kind, str]]:
    """The tensors whose bits `allocate` chooses; raises `PTQError` if there are none.

    An activation's are to be chosen if they are for all that read it, and only if they are paid for.
    """
    held = {layer.reads for layer in layers if "act_bits" in layer.fixed or budget == "size"}
    found: set[tuple[Kind, str]] = {("activation", layer.reads) for layer in layers if layer.reads not in held}
    found |= {("weight", layer.name) for layer in layers if "weight_bits" not in layer.fixed}
    if not found:
        raise PTQError("average_bits has nothing to choose: edges and overrides give the bits of every layer.")
    return found


def allocate(
    layers: Sequence[LayerPlan], found: Divergences, counts: Counts, average_bits: float, budget: Budget
) -> Allocation:
    """The bits of all `choices` with the least sum of divergences within the budget; solved to optimality.

    Together the layers may take what they would with `average_bits` for every choice. "bops": multiply-adds times bits
    of both factors, without products of two activations; "memory": bits of parameters and of what layers read of one
    image; "size": bits of parameters.

    Args:
        found: `divergences` of the `choices` there are.
        counts: of the layers and of the activations they read.

    Raises:
        PTQError: there is nothing to choose.
    """
    free = choices(layers, budget)

    def of_layer(layer: LayerPlan, weight_bits: float, act_bits: float) -> float:
        if budget == "bops":
            return counts.multiply_adds[layer.name] * weight_bits * act_bits
        return layer.parameters * weight_bits

    def of_tensor(name: str, bits: float) -> float:
        return counts.elements[name] * bits if budget == "memory" else 0.0

    weights = {layer.name: BITS if ("weight", layer.name) in free else (layer.weight_bits,) for layer in layers}
    tensors = {layer.reads: BITS if ("activation", layer.reads) in free else (layer.act_bits,) for layer in layers}
    pairs: list[Pair] = [(layer, w, a) for layer in layers for w in weights[layer.name] for a in tensors[layer.reads]]
    activations = [(name, a) for name, widths in tensors.items() for a in widths]
    prices = np.array([of_layer(*pair) for pair in pairs] + [of_tensor(*pair) for pair in activations])
    loss = [found["weight", layer.name, w] if ("weight", layer.name) in free else 0.0 for layer, w, _ in pairs]
    loss += [found["activation", name, a] if ("activation", name) in free else 0.0 for name, a in activations]

    uniform = {name: widths[0] if len(widths) == 1 else average_bits for name, widths in (weights | tensors).items()}
    limit = sum(of_layer(layer, uniform[layer.name], uniform[layer.reads]) for layer in layers)
    limit += sum(of_tensor(name, uniform[name]) for name in tensors)
    within = LinearConstraint(prices / limit, 0.0, 1.0)
    chosen = _least(np.array(loss), [_consistent(pairs, activations), within])
    taken = [pair for pair, on in zip(pairs, chosen, strict=False) if on]
    one = sum(of_layer(layer, 1, 1) for layer in layers) + sum(of_tensor(name, 1) for name in tensors)
    return Allocation(
        {layer.name: w for layer, w, _ in taken if ("weight", layer.name) in free},
        {layer.reads: a for layer, _, a in taken if ("activation", layer.reads) in free},
        float(np.array(loss)[chosen].sum()),
        float(prices[chosen].sum() / one),
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


def _least(losses: np.ndarray, constraints: list[LinearConstraint]) -> np.ndarray:
    """Which of the variables, each 0 or 1, to choose for the least sum of losses.

    The solver takes differences below a millionth of the largest loss for none. What costs more than all that a first
    solution chose can't be in a better one: without it a second one tells smaller differences.
    """
    first = _solved(losses, constraints, np.ones_like(losses))
    most = losses[first].sum() - losses[losses < 0].sum()
    # What costs nothing, or can't be compared, is not solved again.
    return _solved(losses, constraints, losses <= most) if 0.0 < most < np.inf else first


def _solved(losses: np.ndarray, constraints: list[LinearConstraint], allowed: np.ndarray) -> np.ndarray:
    finite = np.isfinite(losses)
    most = losses[finite & (allowed > 0)].max(initial=0.0)
    result = milp(
        # What overflows or is NaN is worse than all that is not, together.
        np.where(finite, losses / max(most, 1e-30), len(losses) + 1.0) * allowed,
        constraints=constraints,
        integrality=np.ones(len(losses)),
        bounds=Bounds(0, allowed),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:  # two bits for every choice are always allowed
        raise PTQError(f"average_bits: the solver found no mixture, and says: {result.message}")
    return result.x > 0.5  # type: ignore[no-any-return]


def apply(student: Chain, weights: Mapping[str, int], activations: Mapping[str, int]) -> None:
    """Give the named layers' weights and the named activation quantizers these bits; they must have no ranges yet."""
    for name, bits in weights.items():
        layer = student.find(name)
        layer.weight_quantizer.set_bits(bits)  # type: ignore[union-attr,operator]
    for name, bits in activations.items():
        quantizer = student.find(name)
        assert isinstance(quantizer, ActQuantizer)
        quantizer.set_bits(bits)
