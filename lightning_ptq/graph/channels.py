"""Which dimension of a tensor is that of channels: where the layer before it writes them, and what moves them since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from lightning_ptq.graph.trace import op_name


def channel_dim(unit: fx.GraphModule, rank: int) -> int:
    """Which dimension of a unit's output, of `rank` dimensions, is that of channels: 1, or the last one (-1).

    Sizes do not tell: a unit may end in more channels than its last layer writes, and images may be as wide as it has.
    """
    # node -> (place of the last layer before it, the dimension that this writes, and where that is by now)
    found: dict[fx.Node, tuple[int, int, int]] = {}
    for place, node in enumerate(unit.graph.nodes):
        before = [found[source] for source in node.all_input_nodes if source in found]
        if (written := _written(unit, node)) is not None:
            found[node] = place, written, written
        elif before:
            *layer, dim = max(before)
            found[node] = *layer, _moved(unit, node, dim, rank)  # type: ignore[assignment]
    (end,) = unit.graph.output_node().all_input_nodes
    if rank < 3 or end not in found:
        return 1
    _, written, dim = found[end]
    # Elsewhere they were split, as in a channel shuffle, and put together where they came from.
    return {1: 1, -1: -1, rank - 1: -1}.get(dim, written)


def written_dim(root: nn.Module, node: fx.Node) -> int:
    """Which dimension the layer before `node`, or `node` itself, writes its channels to."""
    while (dim := _written(root, node)) is None:
        node = node.all_input_nodes[0]
    return dim


def _written(root: nn.Module, node: fx.Node) -> int | None:
    """Where `node` writes channels, if it is a layer."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return -1 if isinstance(module, nn.Linear) else 1 if isinstance(module, _ConvNd) else None


def _moved(root: nn.Module, node: fx.Node, dim: int, rank: int) -> int:
    """Where `node` has what its input has at `dim`, -1 if that is its last; reshaping keeps it."""
    order = _order(root, node, rank)
    if order is None or not -len(order) <= dim < len(order):
        return dim
    at = [source % len(order) for source in order].index(dim % len(order))
    return -1 if at == len(order) - 1 else at


def _order(root: nn.Module, node: fx.Node, rank: int) -> Sequence[int] | None:
    """The order in which `node` puts the dimensions of its input; None if it leaves them as they are."""
    module: Any = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if type(module).__name__ == "Permute":  # torchvision's
        return list(module.dims)
    name = op_name(node)
    if name == "permute":
        given = node.args[1:] or (node.kwargs["dims"],)
        return list(given[0]) if isinstance(given[0], list | tuple) else list(given)  # type: ignore[arg-type]
    if name in ("transpose", "swapaxes", "swapdims"):
        value = node.meta.get("val")
        known = getattr(value, "shape", None)
        order = list(range(rank if known is None else len(known)))
        a, b = (*node.args[1:], *node.kwargs.values())
        if isinstance(a, int) and isinstance(b, int) and -len(order) <= min(a, b) and max(a, b) < len(order):
            order[a], order[b] = order[b], order[a]
        return order
    return None
