"""Rewrites of a traced graph that keep its function: nothing in place, no eval no-ops, untied layers, folded norm."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ptq.errors import PTQError
from lightning_ptq.graph.aliases import is_no_op, overwriting, overwritten
from lightning_ptq.graph.shapes import shape_of
from lightning_ptq.graph.trace import IN_PLACE_OPERATORS, attribute_of, free_name, op_name
from lightning_ptq.layers import is_quantizable

# Mean and standard deviation (O,) of a layer's outputs.
Statistics = tuple[Tensor, Tensor]
# A plain attribute: neither part of the state dict nor of what a checkpoint is checked against.
_STATISTICS = "_folded_statistics"


def normalise(gm: fx.GraphModule) -> None:
    """Rewrite `gm` so that a unit can run on a cached tensor."""
    remove_no_ops(gm)  # first: their outputs are the same tensor as their inputs, which in-place operations overwrite
    remove_in_place(gm)
    free_layout(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def remove_in_place(gm: fx.GraphModule) -> None:
    """Make in-place operations out of place; whoever read the overwritten tensor later reads the result.

    `capture` has seen to it that nobody reads it under another name, as a view of it is.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in overwriting(gm):
        make_out_of_place(gm, node)
        source = overwritten(node)
        for reader in list(source.users):
            if order[reader] > order[node]:
                reader.replace_input_with(source, node)
    for node in gm.graph.nodes:  # of numbers, which `+=` does not overwrite
        node.target = IN_PLACE_OPERATORS.get(node.target, node.target)
    for module in gm.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]


def free_layout(gm: fx.GraphModule) -> None:
    """Replace `view`, which refuses tensors whose memory is laid out another way, by `reshape`, which does not."""
    for node in gm.graph.nodes:
        shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("size")
        if node.op == "call_method" and node.target == "view" and not isinstance(shape, torch.dtype | None):
            node.target = "reshape"
            node.kwargs = {"shape" if key == "size" else key: value for key, value in node.kwargs.items()}


def make_out_of_place(gm: fx.GraphModule, node: fx.Node) -> None:
    """Put a function's or method's out-of-place twin in the place of `node`, which overwrites its input."""
    if node.kwargs.get("inplace") is True:
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.target in IN_PLACE_OPERATORS:
        node.target = IN_PLACE_OPERATORS[node.target]
    elif node.op != "call_module":
        twin = find_twin(node, op_name(node)[:-1])
        if twin is None:
            raise PTQError(
                f"node {node.name!r} calls {op_name(node)}(), which overwrites a tensor and has no out-of-place twin; "
                "units run on cached tensors. Write the line without an in-place operation."
            )
        node.target = twin


def find_twin(node: fx.Node, name: str) -> Any:
    """The out-of-place function or method called `name`, None if there is none."""
    if node.op == "call_method":
        return name if callable(getattr(torch.Tensor, name, None)) else None
    return getattr(torch, name, None) or getattr(F, name, None)


def remove_no_ops(gm: fx.GraphModule) -> None:
    """Drop what does nothing in eval mode: identity, dropout, stochastic depth, checks of shapes."""
    for node in list(gm.graph.nodes):
        if op_name(node) == "_assert":  # it reads tensors, which would forbid to fold a batch norm behind them
            gm.graph.erase_node(node)
            continue
        source = node.args[0] if node.args else node.kwargs.get("input")
        if isinstance(source, fx.Node) and is_no_op(gm, node):
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)


def untie(gm: fx.GraphModule) -> None:
    """Give every call of a quantizable layer or layer norm weights and a bias of its own.

    Each has its own ranges, and folding changes one of them only: what else reads a parameter reads a copy of it.
    """
    weights: dict[int, int] = {}
    own: dict[int, str] = {}  # parameter of a layer -> the layer's name
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        if not is_quantizable(module) and not isinstance(module, nn.LayerNorm):
            continue
        weight = id(module.weight if module.weight is not None else module)
        calls = weights[weight] = weights.get(weight, -1) + 1
        if calls:
            name = free_name(gm, f"{node.target}_{calls}")
            module = deepcopy(module)
            gm.add_submodule(name, module)
            node.target = name
        bias = module._parameters.get("bias")
        if bias is not None and own.setdefault(id(bias), str(node.target)) != node.target:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        own |= {id(parameter): str(node.target) for parameter in module.parameters()}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = attribute_of(gm, str(node.target))
        if id(value) in own:
            name = free_name(gm, f"{node.target}_read")
            parent, _, leaf = name.rpartition(".")
            gm.get_submodule(parent).register_parameter(leaf, nn.Parameter(value.detach().clone(), requires_grad=False))
            node.meta["parameter"], node.target = node.target, name
    gm.recompile()


def fold_batch_norm(gm: fx.GraphModule) -> None:
    """Fold eval-mode batch norm into the convolution or linear layer before it, in fp64.

    Only where nothing else reads the layer's output. A batch norm that stays says why in `meta["float_reason"]`.
    Where shapes are not known, a linear layer's is taken to normalise features, i.e. its input to be (N, features).
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_module":
            continue
        norm = gm.get_submodule(str(node.target))
        if not isinstance(norm, _BatchNorm):
            continue
        reason = why_not_foldable(gm, node, norm)
        if reason:
            node.meta["float_reason"] = f"batch norm not folded: {reason}"
            continue
        layer_node = node.args[0]
        assert isinstance(layer_node, fx.Node)
        fold_into(gm.get_submodule(str(layer_node.target)), norm)
        node.replace_all_uses_with(layer_node)
        gm.graph.erase_node(node)
    gm.recompile()


def why_not_foldable(gm: fx.GraphModule, node: fx.Node, norm: _BatchNorm) -> str:
    """Why the batch norm called by `node` has to stay; empty if it can be folded."""
    source = node.args[0] if node.args else None
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return f"it follows {str(source)!r}, not a convolution or linear module"
    layer = gm.get_submodule(str(source.target))
    if not is_quantizable(layer):
        return f"it follows {source.target!r} ({type(layer).__name__}), not a convolution or linear module"
    calls = sum(other.op == "call_module" and other.target == source.target for other in gm.graph.nodes)
    if calls > 1:
        return f"{source.target!r} is called {calls} times"
    readers = [reader.name for reader in source.users if reader is not node]
    if readers:
        return f"{source.target!r} is also read by {', '.join(map(repr, readers))}"
    assert isinstance(layer.weight, Tensor)
    rows = isinstance(layer, nn.Linear) and len(shape_of(source) or ()) > 2  # (N, rows, features): a norm of the rows
    if rows or layer.weight.shape[0] != norm.num_features:
        return f"it does not normalise the output channels of {source.target!r}"
    return ""


@torch.no_grad()
def fold_into(layer: nn.Module, norm: _BatchNorm) -> None:
    """Give `layer` the weight (O, ...) and bias (O,) of layer and norm together, computed in fp64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()  # (O,)
    if norm.affine:
        factor = factor * norm.weight.double()
    offset = norm._parameters.get("bias")
    shift = -norm.running_mean.double() * factor
    fold_channels(layer, factor, shift if offset is None else shift + offset.double())
    deviation = factor.abs() * norm.running_var.double().sqrt()
    mean = torch.zeros_like(norm.running_mean) if offset is None else offset.detach().float()
    vars(layer)[_STATISTICS] = (mean, deviation.float().clamp(min=1e-6))


@torch.no_grad()
def fold_channels(layer: nn.Module, factor: Tensor, shift: Tensor) -> None:
    """Make `layer` give factor * y + shift where it gave y; both (O,), float64."""
    weight, bias = layer.weight, layer._parameters["bias"]
    assert isinstance(weight, Tensor)
    folded = weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))
    if (known := statistics_of(layer)) is not None:
        mean, deviation = known
        vars(layer)[_STATISTICS] = ((mean * factor + shift).float(), (deviation * factor.abs()).float().clamp(min=1e-6))
    if bias is not None:
        shift = shift + bias.double() * factor
    # New Parameters: another module may hold the old ones.
    layer.weight = nn.Parameter(folded.to(weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)


def statistics_of(layer: nn.Module) -> Statistics | None:
    """Mean and standard deviation (O,) that a folded layer's outputs had in training; None where none was folded.

    Batch norm leaves every channel with its bias for a mean and, but for its epsilon, its weight for a deviation.
    """
    statistics: Statistics | None = vars(layer).get(_STATISTICS)
    return statistics
