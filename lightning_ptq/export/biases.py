"""Biases of an integer model as integers too, for runtimes that want them so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lightning_ptq.convert import OPS
from lightning_ptq.errors import PTQError
from lightning_ptq.graph.trace import attribute_of

_LIMITS = torch.iinfo(torch.int32)
_PER_TENSOR, _PER_CHANNEL = OPS.dequantize_per_tensor.default, OPS.dequantize_per_channel.default


@torch.no_grad()
def biases_as_integers(model: fx.GraphModule) -> None:
    """Store every bias of a converted model as int32, in multiples of input scale x weight scale, in place.

    In these an integer kernel adds up its products. What a bias is more or less than a multiple is lost; behind a
    calibration with placement "hardware", which rounds biases, that is nothing.

    Raises:
        PTQError: a bias that int32 does not hold.
    """
    for node in list(model.graph.nodes):
        if not is_layer_with_bias(node):
            continue
        x, weight, bias = node.args[:3]
        value, step = attribute_of(model, bias.target), input_scale(x) * weight_scales(model, weight)
        integers = (value.double() / step).round()
        if integers.abs().max() > _LIMITS.max:
            raise PTQError(f"{bias.target!r} is beyond int32 in steps of its scales. Leave integer_biases out.")
        layer, _, _ = bias.target.rpartition(".")
        owner = model.get_submodule(layer)
        with model.graph.inserting_before(node):

            def fetch(leaf: str, stored: Tensor, owner: Any = owner, layer: str = layer) -> fx.Node:
                owner.register_buffer(leaf, stored)
                return model.graph.get_attr(f"{layer}.{leaf}")

            count = len(integers)
            grid = (_LIMITS.min, _LIMITS.max, torch.int32)
            parts = fetch("bias_integers", integers.int()), fetch("bias_scale", step.float().expand(count).clone())
            zeros = fetch("bias_zero_point", torch.zeros(count, dtype=torch.long))
            real = model.graph.call_function(_PER_CHANNEL, (*parts, zeros, 0, *grid))
        node.update_arg(2, real)
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    model.recompile()


def is_layer_with_bias(node: fx.Node) -> bool:
    """Whether a node computes what a quantized layer does, and adds a bias."""
    if node.op != "call_function" or len(node.args) < 3:
        return False
    weight, bias = node.args[1:3]
    return (
        isinstance(weight, fx.Node)
        and weight.target in (_PER_TENSOR, _PER_CHANNEL)
        and isinstance(bias, fx.Node)
        and bias.op == "get_attr"
    )


def input_scale(x: Any) -> float:
    """The scale of the integers that `x` stands for, which may have been moved about since."""
    while x.target is not _PER_TENSOR:
        x = x.all_input_nodes[0]
    return float(x.args[1])


def weight_scales(model: fx.GraphModule, weight: fx.Node) -> Tensor:
    """Scale of each output channel (O,), or of all of them (1,), float64."""
    scale: Any = weight.args[1]
    return (attribute_of(model, str(scale.target)) if isinstance(scale, fx.Node) else torch.tensor([scale])).double()
