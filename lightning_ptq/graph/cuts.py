"""Where a graph may be cut into units, and where it is cut at each granularity.

All positions are indices into `computed(graph)`; "cut i" means after node i. Everything is decided statically: there
is no example input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import fx, nn
from torch.nn.modules.activation import MultiheadAttention
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from lightning_ptq.config import Granularity
from lightning_ptq.graph.placement import Placement
from lightning_ptq.graph.shapes import has_a_row_an_image
from lightning_ptq.graph.trace import node_kinds, op_name, words

_STICKY_OPS = words(
    "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid logsigmoid "
    "tanh softplus softsign softshrink hardshrink tanhshrink threshold add sub mul truediv div neg clamp clamp_min "
    "clamp_max clip minimum maximum max_pool1d max_pool2d max_pool3d"
)
_NOT_POINTWISE = (MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)


def computed(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute something.

    Parameters, constants and the batch size are fetched anew by each unit that needs them.
    """
    return [node for node in graph.nodes if node.op.startswith("call_") and not node.meta.get("batch_size")]


class Liveness:
    """Values that are still needed after each node.

    Attributes:
        nodes: the computed nodes.
        points: cut points, i.e. the places where one tensor, the node's own, is all that is needed.
        points_but_for_scalars: places where one tensor, the node's own, and scalars are all that is needed.
        branching: places where more than one tensor is needed.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        kinds = node_kinds(gm)
        self.nodes = computed(gm.graph)
        sources = [node for node in gm.graph.nodes if node.op == "placeholder"]
        order = {node: i for i, node in enumerate([*self.nodes, gm.graph.output_node()])}
        is_point = [kinds[node] == "tensor" and has_a_row_an_image(node) for node in self.nodes]

        live = lives([*sources, *self.nodes], order)
        self.points = {i for i, node in enumerate(self.nodes) if is_point[i] and live[i] == {node}}
        self.branching = {i for i, values in enumerate(live) if sum(kinds[v] != "scalar" for v in values) > 1}

        tensors = [node for node in [*sources, *self.nodes] if kinds[node] != "scalar"]
        live = lives(tensors, {node: i for node, i in order.items() if kinds.get(node) != "scalar"}, len(self.nodes))
        self.points_but_for_scalars = {i for i, node in enumerate(self.nodes) if is_point[i] and live[i] == {node}}


def lives(values: Sequence[fx.Node], order: Mapping[fx.Node, int], places: int | None = None) -> list[set[fx.Node]]:
    """For every place in `order`, which of `values` are still read behind it by a node in `order`."""
    alive: list[set[fx.Node]] = [set() for _ in range(len(order) if places is None else places)]
    for value in values:
        last = max((order[reader] for reader in value.users if reader in order), default=-1)
        for i in range(order.get(value, 0), min(last, len(alive))):
            alive[i].add(value)
    return alive


def find_cuts(placement: Placement, granularity: Granularity) -> list[int]:
    """Where the network is cut, so that every unit holds a quantizable layer."""
    live = Liveness(placement.gm)
    sticky = [is_sticky(placement, node) for node in live.nodes]
    layers = [i for i, node in enumerate(live.nodes) if node in placement.layers]
    if granularity == "net":
        return []
    if granularity == "layer":
        return cut_between(layers, live.points, sticky)
    inside = {i for first, last in block_spans(live, layers) for i in range(first, last)}
    cuts = cut_between(layers, live.points - inside, sticky)
    if granularity == "block":
        return cuts
    return [cut for cut, starts in zip(cuts, stage_starts(placement.gm, live, layers, cuts), strict=True) if starts]


def find_taps(placement: Placement, unit: Sequence[fx.Node]) -> list[fx.Node]:
    """Where each layer of a unit ends, except the last, which answers for the unit's output.

    A layer ends behind the activations and quantizers that only read its output.
    """
    ends = []
    for node in [node for node in unit if node in placement.layers][:-1]:
        while len(node.users) == 1:
            (reader,) = node.users
            if reader not in unit or not is_sticky(placement, reader) or len(reader.all_input_nodes) > 1:
                break
            node = reader
        ends.append(node)
    return ends


def cut_between(layers: Sequence[int], points: Collection[int], sticky: Sequence[bool]) -> list[int]:
    """At most one cut between two layers: behind what sticks to the first, everything else goes to the second."""
    cuts = []
    for layer, following in pairwise(layers):
        start: int | None = layer
        while start is not None:
            end = start + 1
            while end < following and sticky[end]:
                end += 1
            found = [i for i in range(start, end) if i in points]
            if found:
                cuts.append(found[-1])
                break
            start = next((i for i in range(end, following) if i in points), None)
    return cuts


def is_sticky(placement: Placement, node: fx.Node) -> bool:
    """Whether a node stays with the layer before it: activations, additions, quantizers, max pooling."""
    if node in placement.quantizers:
        return True
    if node.op == "call_module":
        module = placement.gm.get_submodule(str(node.target))
        activation = type(module).__module__ == "torch.nn.modules.activation"
        return isinstance(module, _MaxPoolNd) or (activation and not isinstance(module, _NOT_POINTWISE))
    return op_name(node) in _STICKY_OPS


def block_spans(live: Liveness, layers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last node of every block.

    A region between two cut points that branches belongs to the smallest module that holds all of it; that module's
    class is a block class, and all its instances are blocks. A module with every layer of the network in it is the
    network, however it is wrapped; a region without layers (such as a hand-written swish) needs no block.
    """
    stacks = [list((node.meta.get("nn_module_stack") or {}).items()) for node in live.nodes]
    spans: dict[str, list[int]] = {}  # call of a module -> its nodes
    classes: dict[str, type] = {}
    for i, stack in enumerate(stacks):
        for call, (_, cls) in stack:
            spans.setdefault(call, []).append(i)
            classes[call] = cls
    network = {call for call, span in spans.items() if all(span[0] <= i <= span[-1] for i in layers)}

    block_classes = set()
    for previous, point in pairwise([-1, *sorted({*live.points, len(live.nodes) - 1})]):
        region = range(previous + 1, point + 1)
        if not any(i in live.branching for i in region) or not any(i in layers for i in region):
            continue
        common = [entry for entry in stacks[region[0]] if all(entry in stacks[i] for i in region)]
        if common and common[-1][0] not in network:
            block_classes.add(common[-1][1][1])
    # A plain container says nothing about other instances, and its own region is one unit anyhow.
    block_classes -= {nn.Sequential, nn.ModuleList, nn.ModuleDict}
    return [(s[0], s[-1]) for call, s in spans.items() if classes[call] in block_classes and call not in network]


def stage_starts(gm: fx.GraphModule, live: Liveness, layers: Sequence[int], cuts: Sequence[int]) -> list[bool]:
    """For every cut, whether a stage starts behind it, i.e. the unit there works at a lower resolution."""
    starts = set()
    bounds = [*cuts, len(live.nodes) - 1]
    for i, node in enumerate(live.nodes):
        if reduces_resolution(gm, node):
            unit = next(k for k, end in enumerate(bounds) if i <= end)
            # Pooling of the chain's one tensor behind the unit's last layer is the next unit's resolution.
            behind = i in live.points and not any(i <= layer <= bounds[unit] for layer in layers)
            starts.add(unit + behind)
    return [unit + 1 in starts for unit in range(len(cuts))]


def reduces_resolution(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a convolution, pooling or slice with a spatial stride above 1."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, _MaxPoolNd | _AvgPoolNd | _ConvNd) and not getattr(module, "transposed", False):
            return any_above_one(module.stride)
        return False
    name = op_name(node)
    if name == "slice" and len(node.args) > 4:
        return any_above_one(node.args[4])
    if name == "getitem" and isinstance(node.args[1], tuple):
        index = node.args[1]
        spatial = index[index.index(...) + 1 :] if ... in index else index[2:]
        return any(isinstance(part, slice) and any_above_one(part.step) for part in spatial)
    if name in ("conv1d", "conv2d", "conv3d"):
        return any_above_one(node.kwargs.get("stride", node.args[3] if len(node.args) > 3 else 1))
    if name.startswith(("max_pool", "avg_pool")):
        kernel = node.kwargs.get("kernel_size", node.args[1] if len(node.args) > 1 else 1)
        return any_above_one(node.kwargs.get("stride", node.args[2] if len(node.args) > 2 else None) or kernel)
    return False


def any_above_one(value: Any) -> bool:
    """Whether a stride, or any element of it, is an integer above 1."""
    return any(isinstance(v, int) and v > 1 for v in (value if isinstance(value, list | tuple) else (value,)))


def slices(nodes: Sequence[fx.Node], cuts: Sequence[int]) -> Iterator[list[fx.Node]]:
    """The nodes of each unit."""
    for start, end in pairwise([0, *(cut + 1 for cut in cuts), len(nodes)]):
        yield list(nodes[start:end])
