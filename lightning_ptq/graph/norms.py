"""Layer norms whose output only linear layers read, quantized once: their channels can be brought to one range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from lightning_ptq.graph.placement import Placement
from lightning_ptq.graph.shapes import shape_of
from lightning_ptq.graph.trace import op_name, words

# Operations that may lie between a norm and its quantizer, whatever their arguments: if they touched the last
# dimension, it would no longer be as long as the linear layers' input. Padding is none of them: it adds zeros.
_MOVES = words("reshape view flatten unsqueeze squeeze contiguous clone")


@dataclass(frozen=True)
class ChannelGroup:
    """A layer norm, or a layer, and the layers that read it through one quantizer, by their qualified names."""

    source: str
    quantizer: str
    layers: tuple[str, ...]


def find_norms(placement: Placement) -> tuple[ChannelGroup, ...]:
    """Every layer norm with weights that linear layers alone read, through one quantizer."""
    gm, groups = placement.gm, []
    for quantizer in placement.quantizers:
        norm = source_norm(gm, quantizer)
        readers = list(quantizer.users)
        linear = all(reader in placement.layers and _is_linear(gm, reader) for reader in readers)
        if norm is None or not linear or gm.graph.output_node() in readers:
            continue
        module, layers = gm.get_submodule(str(norm.target)), [gm.get_submodule(str(r.target)) for r in readers]
        assert isinstance(module, nn.LayerNorm)
        width = module.normalized_shape[0]
        calls = sum(node.op == "call_module" and node.target == norm.target for node in gm.graph.nodes)
        if calls == 1 and all(layer.in_features == width for layer in layers):
            groups.append(ChannelGroup(str(norm.target), str(quantizer.target), tuple(str(r.target) for r in readers)))
    order = {str(node.target): i for i, node in enumerate(gm.graph.nodes)}
    return tuple(sorted(groups, key=lambda group: order[group.source]))


def source_norm(gm: fx.GraphModule, quantizer: fx.Node) -> fx.Node | None:
    """The layer norm over the last dimension whose output, moved about, is all that `quantizer` reads; None without."""
    node = quantizer.all_input_nodes[0]
    while is_move(node) and len(node.users) == 1 and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if node.op != "call_module" or len(node.users) != 1:
        return None
    module = gm.get_submodule(str(node.target))
    is_norm = type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and module.elementwise_affine
    return node if is_norm else None


def is_move(node: fx.Node) -> bool:
    """Whether `node` only moves vectors of channels about: the last dimension stays the last, and in order."""
    name, rest = op_name(node), [*node.args[1:], *(v for k, v in node.kwargs.items() if k != "input")]
    flat: list[Any] = [v for part in rest for v in (part if isinstance(part, list | tuple) else (part,))]
    if name == "permute":
        return bool(flat) and flat[-1] in (-1, len(flat) - 1)
    if name == "transpose":  # multi-head attention swaps batch and tokens
        return set(flat) == {0, 1}
    if name == "roll":  # of rows and columns; (1, 2) would be tokens and channels of a three-dimensional tensor
        dims = node.kwargs.get("dims", node.args[2] if len(node.args) > 2 else ())
        return dims in ((1, 2), [1, 2]) and len(shape_of(node) or "NHWC") > 3
    if name in ("select", "slice"):
        return not flat or flat[0] in (0, 1)
    if name == "getitem":
        return len(flat) <= 2 and all(isinstance(part, int | slice) for part in flat)
    return name in _MOVES


def give_biases(gm: fx.GraphModule, groups: Sequence[ChannelGroup]) -> None:
    """A bias of zero where a norm or layer of `groups` has none, for `equalize.py` to write to."""
    for group in groups:
        for name in (group.source, *group.layers):
            owner = gm.get_submodule(name)
            if owner.bias is None:
                assert isinstance(owner.weight, Tensor)
                zeros = owner.weight.new_zeros(owner.weight.shape[0])
                owner.register_parameter("bias", nn.Parameter(zeros, requires_grad=False))


def _is_linear(gm: fx.GraphModule, node: fx.Node) -> bool:
    return type(gm.get_submodule(str(node.target))) is nn.Linear
