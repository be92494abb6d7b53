"""Where integer runtimes want quantizers beyond those of the papers: around everything that has an integer kernel.

A kernel takes integers and gives integers. So both inputs of an addition are quantized, and the output of every layer,
behind the ReLU that the kernel computes with it. What only moves numbers about, or takes the largest of them, works on
integers as they are, and shares the quantizer of what it reads.
"""

from __future__ import annotations

from torch import fx, nn
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd, _MaxPoolNd

from lightning_ptq.graph.trace import op_name, words

_KERNEL_OPS = words(
    "add sub mul cat concat avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d mean pad"
)
_KERNELS = (_AvgPoolNd, _AdaptiveAvgPoolNd)
_MOVE_OPS = words(
    "max_pool1d max_pool2d max_pool3d reshape view flatten permute transpose squeeze unsqueeze contiguous getitem "
    "slice select"
)
_MOVES = (_MaxPoolNd, nn.Flatten, nn.Unflatten, nn.Identity)
# What a kernel computes with the layer before it.
_FUSED_OPS, _FUSED = words("relu relu6"), (nn.ReLU, nn.ReLU6)


def kernels(gm: fx.GraphModule, dependent: set[fx.Node]) -> list[fx.Node]:
    """The nodes without weights that have integer kernels, among those that depend on the image."""
    return [node for node in gm.graph.nodes if node in dependent and does(gm, node, _KERNEL_OPS, _KERNELS)]


def origin(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """What `node` moves about: the tensor whose quantizer it shares; `node` itself if it computes something."""
    while does(gm, node, _MOVE_OPS, _MOVES):  # what else it may read are sizes and indices
        node = node.all_input_nodes[0]
    return node


def result(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """What the kernel that computes `node` gives: the output of the activation that alone reads it, or its own."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and does(gm, readers[0], _FUSED_OPS, _FUSED) else node


def moved(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """What the kernel that computes `node` gives, and what becomes of it where it is only moved about, in order."""
    found = [result(gm, node)]
    while len(readers := list(found[-1].users)) == 1 and does(gm, readers[0], _MOVE_OPS, _MOVES):
        found += readers
    return found


def does(gm: fx.GraphModule, node: fx.Node, ops: frozenset[str], modules: tuple[type, ...]) -> bool:
    """Whether a node calls one of these functions, or a module of one of these classes."""
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), modules)
    return node.op in ("call_function", "call_method") and op_name(node) in ops
