"""Biases that keep values off the middle between two integers, where the last bit of a sum decides what is rounded up.

With few bits a layer adds up so few different numbers that one of its sums turns up again and again. If that one lies
in the middle, runtimes that add in another order round it differently at every place, and the layers behind make more
of it: a file is then another network than the one that was simulated, though every operation is right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from lightning_ptq.functional import in_float32
from lightning_ptq.graph import Chain
from lightning_ptq.graph.hardware import does
from lightning_ptq.graph.trace import words
from lightning_ptq.layers import QuantizedLayer
from lightning_ptq.quantizers import ActQuantizer
from lightning_ptq.store import chunks, widened

# In steps of the quantizer: what sums in another order differ by as a rule, and how far a bias may move, nearest first.
_NEAR = 3e-5
_MOVES = tuple(sorted((k * 1e-4 for k in range(-8, 9)), key=abs))
# With eight bits sums are of many numbers, and some biases are multiples that a kernel wants.
_FEW_BITS = 7
# What a constant passes that is added to a channel before it, unless a ReLU saturates.
_PASSES = words("relu relu6 add dropout")


@torch.no_grad()
def steer_clear(student: Chain, images: Tensor, device: torch.device, mean: Callable[[Tensor], Tensor]) -> None:
    """Move biases by less than a thousandth of a step where fewer values of a channel then lie on a tie, in place.

    One pass for each unit: what a move changes behind it in the same unit is not looked at again.

    Args:
        images: what the student reads (N, ...); the first 64 are looked at, or fewer large ones.
        mean: averages a tensor over processes.
    """
    x = widened(next(chunks(images)).to(device))
    moves = torch.tensor(_MOVES, device=device)
    with in_float32(device):
        for unit in student.units:
            assert isinstance(unit, fx.GraphModule)
            for quantizer, layer, counts in few_bit_quantizers(unit, x):
                layer.weight_quantizer.bias_shift.add_(moves[first_least(mean(counts))] * quantizer.scale)
            x = unit(x)


def few_bit_quantizers(unit: fx.GraphModule, x: Tensor) -> list[tuple[ActQuantizer, QuantizedLayer, Tensor]]:
    """The unit's quantizers of few bits, the layer whose bias moves what each reads, each once, and their `ties`.

    Args:
        x: the unit's input (N, ...).
    """
    fed: dict[QuantizedLayer, ActQuantizer] = {}
    for node in unit.graph.nodes:
        quantizer = unit.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(quantizer) is ActQuantizer and quantizer.bits <= _FEW_BITS:
            layer = layer_before(unit, node.all_input_nodes[0])
            if layer is not None:
                fed.setdefault(layer, quantizer)
    if not fed:
        return []
    counts: dict[nn.Module, Tensor] = {}

    def count(layer: QuantizedLayer) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def look(quantizer: nn.Module, read: tuple[Tensor]) -> None:
            assert isinstance(quantizer, ActQuantizer)
            # Not where a sum spreads one channel over several.
            if read[0].shape[layer.channel_dim] == len(layer.weight_quantizer.bias_shift):
                counts[layer] = ties(read[0], quantizer, layer.channel_dim)

        return look

    hooks = [quantizer.register_forward_pre_hook(count(layer)) for layer, quantizer in fed.items()]
    try:
        unit(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [(quantizer, layer, counts[layer]) for layer, quantizer in fed.items() if layer in counts]


def layer_before(unit: fx.GraphModule, node: fx.Node) -> QuantizedLayer | None:
    """The quantized layer whose output `node` is, but for sums and ReLUs; None if there is none in this unit."""
    if node.op == "call_module" and isinstance(module := unit.get_submodule(str(node.target)), QuantizedLayer):
        return module
    if not does(unit, node, _PASSES, (nn.ReLU, nn.ReLU6, nn.Dropout)):
        return None
    found = (layer_before(unit, source) for source in node.all_input_nodes)
    return next((layer for layer in found if layer is not None), None)


def ties(x: Tensor, quantizer: ActQuantizer, channel_dim: int) -> Tensor:
    """For each of the moves: how many values of each channel would then lie on a tie (moves, C).

    Args:
        x: what the quantizer reads.
    """
    steps = x.movedim(channel_dim, -1) / quantizer.scale
    channels = steps.shape[-1]
    distance = (steps - steps.floor() - 0.5).reshape(-1)  # to the middle between two integers
    inside = ((steps > quantizer.low) & (steps < quantizer.high)).reshape(-1)
    close = (inside & (distance.abs() < max(_MOVES) + _NEAR)).nonzero().flatten()
    distance, channel = distance[close], close % channels
    found = [torch.bincount(channel[(distance + move).abs() < _NEAR], minlength=channels).float() for move in _MOVES]
    return torch.stack(found)


def first_least(counts: Tensor) -> Tensor:
    """Index of the first least count of every channel, (moves, C) -> (C,)."""
    index = torch.arange(len(counts), device=counts.device)[:, None]
    return torch.where(counts == counts.min(0).values, index, len(counts)).argmin(0)
