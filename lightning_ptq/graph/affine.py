"""A layer's output times or plus fixed numbers, one for each channel: folded into the layer.

Frozen batch norms (of torchvision's detectors, say) and learned factors of layers are written like that.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from lightning_ptq.graph.fold import fold_channels
from lightning_ptq.graph.trace import attribute_of, is_torch_op, op_name
from lightning_ptq.layers import is_quantizable


def fold_affine(gm: fx.GraphModule) -> None:
    """Fold such products and sums into the convolution or linear layer before them, where nothing else reads it."""
    for node in list(gm.graph.nodes):
        name = op_name(node)
        if name not in ("mul", "add") or not (is_torch_op(node) or node.target in (operator.mul, operator.add)):
            continue
        if len(node.args) != 2 or node.kwargs:
            continue
        for source, other in (node.args, node.args[::-1]):
            layer = foldable_layer(gm, source)
            values = None if layer is None else channel_values(gm, layer, other)
            if layer is not None and values is not None:
                ones, zeros = torch.ones_like(values), torch.zeros_like(values)
                fold_channels(layer, *((values, zeros) if name == "mul" else (ones, values)))
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)
                break
    gm.graph.eliminate_dead_code()
    gm.recompile()


def foldable_layer(gm: fx.GraphModule, node: Any) -> nn.Module | None:
    """The layer that `node` calls, if it is called once and read by one operation."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return None
    layer = gm.get_submodule(str(node.target))
    calls = sum(other.op == "call_module" and other.target == node.target for other in gm.graph.nodes)
    return layer if is_quantizable(layer) and calls == 1 else None


def channel_values(gm: fx.GraphModule, layer: nn.Module, value: Any) -> Tensor | None:
    """A number for each output channel of `layer` (O,), float64; None if `value` is anything else."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return weight.new_full((weight.shape[0],), value, dtype=torch.float64)
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    fixed = attribute_of(gm, str(value.target))
    if not isinstance(fixed, Tensor) or not fixed.is_floating_point():
        return None
    fixed = fixed.detach().to(weight.device, torch.float64)
    if fixed.numel() == 1 and fixed.dim() <= weight.dim():
        return fixed.reshape(1).expand(weight.shape[0])
    # Behind the channels of a convolution come its positions; those of a linear layer are the last dimension.
    behind = weight.dim() - 2 if isinstance(layer, _ConvNd) else 0
    shape = [weight.shape[0], *[1] * behind]
    fits = list(fixed.shape) in (shape, [1, *shape]) if behind else list(fixed.shape) == shape
    return fixed.flatten() if fits else None
