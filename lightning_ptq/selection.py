"""What is trained: the parameters of one unit, of the whole network, or none; and how quantizers behave meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_ptq.drop import DropMask
from lightning_ptq.graph.units import Chain
from lightning_ptq.layers import quantized_layers
from lightning_ptq.methods import Method
from lightning_ptq.quantizers import WeightQuantizer, act_quantizers, weight_quantizers


@dataclass(frozen=True)
class Selection:
    """What was selected.

    Attributes:
        trained: parameters that require gradients, none but these.
        rounded: weight quantizers whose rounding is among them.
    """

    trained: list[nn.Parameter]
    rounded: list[WeightQuantizer]


def select(student: Chain, unit: int | None, method: Method, drop: DropMask) -> Selection:
    """Train unit `unit` of `student`, the whole network if that is len(student), or nothing if None.

    Weights never require gradients. Activation quantizers of the unit drop elements by `drop`; weight quantizers hold
    what no step changes until the next selection.
    """
    student.requires_grad_(False)
    for act in act_quantizers(student):
        act.drop = None
    for weight in weight_quantizers(student):
        weight.release()
    drop.forget()
    if unit is None:
        return Selection([], [])
    whole = unit == len(student)
    calibrated: nn.Module = student if whole else student.units[unit]
    acts, weights = act_quantizers(calibrated), weight_quantizers(calibrated)
    rounded = [] if whole else [q for q in weights if q.alpha is not None]
    trained = [q.alpha for q in rounded if q.alpha is not None]
    if method.scales != "none":
        trained += [q.log_scale for q in acts]
    if method.corrections and (whole or method.scales != "none"):
        trained += [parameter for q in weights for parameter in q.corrections]
    for parameter in trained:
        parameter.requires_grad_(True)
    for act in acts:
        act.drop = None if whole else drop
    for _, layer in quantized_layers(calibrated):  # after requires_grad: what is held depends on it
        layer.weight_quantizer.hold(layer.weight)
    return Selection(trained, rounded)
