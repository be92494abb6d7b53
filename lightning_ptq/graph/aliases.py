"""Which operations overwrite a tensor, and whether something reads it under another name afterwards.

A graph of functions has no memory: an operation that overwrites its input can be made one that does not, with its
result for all later readers, only if they all read that input itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_ptq.graph.trace import IN_PLACE_OPERATORS, Kind, is_torch_op, node_kinds, op_name, words

_RANDOM_DROPS = words(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout stochastic_depth "
    "drop_path"
)
# What may give its input's memory under another name: views, and conversions to what it is already.
_VIEWS = words(
    "view view_as reshape reshape_as flatten unflatten ravel narrow select getitem squeeze unsqueeze permute transpose "
    "swapaxes swapdims movedim moveaxis t adjoint expand expand_as broadcast_to diagonal unfold as_strided chunk split "
    "split_with_sizes tensor_split hsplit vsplit dsplit unbind unsafe_chunk unsafe_split detach contiguous to type_as "
    "type float double half bfloat16 cpu cuda real imag view_as_real view_as_complex atleast_1d atleast_2d atleast_3d "
    "broadcast_tensors getattr"
)
# Of these views, those that give parts which have no memory in common.
_SPLITS = words("chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind unsafe_chunk unsafe_split")
_VIEW_MODULES = (nn.Flatten, nn.Unflatten)


def overwriting(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that overwrite their first input, in order."""
    kinds = node_kinds(gm)
    return [node for node in gm.graph.nodes if _overwrites(gm, node, kinds)]


def _overwrites(gm: fx.GraphModule, node: fx.Node, kinds: Mapping[fx.Node, Kind]) -> bool:
    source = _input_of(node)
    if source is None or is_no_op(gm, node):
        return False
    if node.op == "call_module":
        return getattr(gm.get_submodule(str(node.target)), "inplace", None) is True
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in IN_PLACE_OPERATORS:
        return kinds[source] != "scalar"
    name = op_name(node)
    named = name.endswith("_") and not name.startswith("_") and is_torch_op(node)
    return named or node.kwargs.get("inplace") is True


def overwritten(node: fx.Node) -> fx.Node:
    """The tensor that `node` overwrites."""
    source = _input_of(node)
    assert source is not None
    return source


def _input_of(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) else None


def overwritten_alias(gm: fx.GraphModule) -> fx.Node | None:
    """A node that overwrites a tensor which something reads under another name afterwards; None if there is none.

    Parts of a tensor count as the whole of it, but for those that splits give, whether or not they have memory in
    common. What nothing is known of may be a tensor or not.
    """
    kinds, writing = node_kinds(gm), set(overwriting(gm))
    order: dict[fx.Node, int] = {node: i for i, node in enumerate(gm.graph.nodes)}
    same: dict[fx.Node, fx.Node] = {}  # node -> the first that is the same tensor
    memory: dict[fx.Node, tuple[object, ...]] = {}  # node -> the first that has its memory, and which part of it
    for node in order:
        if node.kwargs.get("out") is not None:
            return node
        source = _input_of(node)
        is_same = source is not None and (node in writing or is_no_op(gm, node))
        is_view = source is not None and kinds[node] in ("tensor", "tuple") and _is_view(gm, node)
        same[node] = same[source] if is_same and source is not None else node
        part = ((source, node.args[1]),) if source is not None and _is_part(node, source) else ()
        memory[node] = (*memory[source], *part) if (is_same or is_view) and source is not None else (node,)
    for node in filter(writing.__contains__, order):
        others = [x for x in order if _overlap(memory[x], memory[node]) and same[x] is not same[node]]
        readers = [reader for x in others if order[x] < order[node] for reader in x.users]
        if kinds[overwritten(node)] == "opaque":  # if it is a number, it is not overwritten
            readers += overwritten(node).users
        if any(order[reader] > order[node] for reader in readers):
            return node
    return None


def _is_part(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` is one of the parts into which `source` splits a tensor."""
    part = node.args[1] if op_name(node) == "getitem" else None
    return isinstance(part, int) and part >= 0 and op_name(source) in _SPLITS


def _overlap(memory: Sequence[object], other: Sequence[object]) -> bool:
    """Whether one is the other, or a part of it."""
    return all(a == b for a, b in zip(memory, other, strict=False))


def _is_view(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), _VIEW_MODULES)
    return op_name(node) in _VIEWS


def is_no_op(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` returns its input unchanged in eval mode."""
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), nn.Identity | _DropoutNd)
    if node.op == "call_function" and op_name(node) in _RANDOM_DROPS:
        training = node.kwargs.get("training", node.kwargs.get("train", node.args[-1]))
        return training is False
    return False
