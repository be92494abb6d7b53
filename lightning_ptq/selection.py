"""What is trained: the parameters of one unit, of the whole network, or none; and how quantizers behave meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_ptq.drop import DropMask
from lightning_ptq.graph.units import Chain
from lightning_ptq.layers import quantized_layers
from lightning_ptq.methods import Method
from lightning_ptq.quantizers import act_quantizers, weight_quantizers
from lightning_ptq.weights import AdaRound


@dataclass(frozen=True)
class Selection:
    """What was selected.

    Attributes:
        trained: parameters that require gradients, none but these.
        rounded: weight quantizers whose rounding is soft.
    """

    trained: list[nn.Parameter]
    rounded: list[AdaRound]


def select(
    student: Chain, unit: int | None, method: Method, drop: DropMask, *, round_again: bool = False, fresh: bool = True
) -> Selection:
    """Train unit `unit` of `student`, the whole network if that is len(student), or nothing if None.

    Weights never require gradients. Activation quantizers of the unit drop elements by `drop`; weight quantizers hold
    what no step changes until the next selection.

    Args:
        round_again: train the rounding of weights with the whole network too; straight through, since soft rounding
            starts from undecided weights. fresh: from where the units left it, not from where a checkpoint did.
    """
    student.requires_grad_(False)
    for act in act_quantizers(student):
        act.drop = None
    for weight in weight_quantizers(student):
        weight.release()
        if isinstance(weight, AdaRound):
            weight.straight = False
    drop.forget()
    if unit is None:
        return Selection([], [])
    whole = unit == len(student)
    calibrated: nn.Module = student if whole else student.units[unit]
    acts, weights = act_quantizers(calibrated), weight_quantizers(calibrated)
    adaround = [q for q in weights if isinstance(q, AdaRound)]
    trained = [parameter for q in weights for parameter in q.roundings] if round_again or not whole else []
    if method.scales != "none":
        trained += [q.log_scale for q in acts]
    if method.corrections and (whole or method.scales != "none"):
        trained += [parameter for q in weights for parameter in q.corrections]
    for parameter in trained:
        parameter.requires_grad_(True)
    for act in acts:
        act.drop = None if whole else drop
    for q in adaround:
        q.straight = whole and round_again
    for _, layer in quantized_layers(calibrated):  # after requires_grad: what is held depends on it
        if whole and round_again and fresh:
            layer.weight_quantizer.reopen(layer.weight)
        layer.weight_quantizer.hold(layer.weight)
    return Selection(trained, [] if whole else adaround)
