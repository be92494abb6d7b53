"""Layer norms whose output only linear layers read, quantized once: their channels can be brought to one range."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from lightning_ptq.graph.placement import Placement
from lightning_ptq.graph.trace import op_name, words

# What may lie between a norm and its quantizer: moves of whole channel vectors. Not padding, which adds zeros.
_MOVES = words("reshape view flatten roll slice getitem select unsqueeze squeeze contiguous clone")


@dataclass(frozen=True)
class NormGroup:
    """A layer norm and what reads it, by their qualified names."""

    norm: str
    quantizer: str
    layers: tuple[str, ...]


def find_norms(placement: Placement) -> tuple[NormGroup, ...]:
    """Every layer norm with weights that linear layers alone read, through one quantizer.

    Norm and layers get a bias of zero where they have none, for `equalize.py` to write to.
    """
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
            for owner in (module, *layers):
                if owner.bias is None:
                    owner.bias = nn.Parameter(owner.weight.new_zeros(owner.weight.shape[0]), requires_grad=False)
            groups.append(NormGroup(str(norm.target), str(quantizer.target), tuple(str(r.target) for r in readers)))
    order = {str(node.target): i for i, node in enumerate(gm.graph.nodes)}
    return tuple(sorted(groups, key=lambda group: order[group.norm]))


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
    """Whether `node` only moves vectors of channels about: the last dimension stays the last."""
    name, dims = op_name(node), [v for v in node.args[1:] if isinstance(v, int)]
    if name == "permute":
        order = node.args[1] if isinstance(node.args[1], list | tuple) else dims
        return order[-1] in (-1, len(order) - 1)
    if name == "transpose":
        # Two of the first dimensions, as multi-head attention swaps batch and tokens.
        return set(dims) == {0, 1}
    return name in _MOVES


def _is_linear(gm: fx.GraphModule, node: fx.Node) -> bool:
    return type(gm.get_submodule(str(node.target))) is nn.Linear
