"""Layers whose output other layers alone read, behind at most a ReLU: their channels can be rescaled."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from lightning_ptq.graph.hardware import does
from lightning_ptq.graph.norms import ChannelGroup
from lightning_ptq.graph.placement import Placement
from lightning_ptq.graph.trace import words

# Operations f, channel by channel, with f(s * x) = s * f(x) for positive s. ReLU6 is none.
_HOMOGENEOUS_OPS, _HOMOGENEOUS = words("relu leaky_relu"), (nn.ReLU, nn.LeakyReLU, nn.PReLU)
# The same behind a convolution. Behind a linear layer they pool channels.
_POOL_OPS = words("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d")
_POOLS = (_MaxPoolNd, _AvgPoolNd)


def find_pairs(placement: Placement) -> tuple[ChannelGroup, ...]:
    """Every convolution or linear layer whose output, but for homogeneous operations, layers of its kind alone read,
    through one quantizer."""
    gm, groups = placement.gm, []
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for quantizer in sorted(placement.quantizers, key=order.__getitem__):
        source, readers = source_layer(placement, quantizer), list(quantizer.users)
        if source is None or not readers or not all(reader in placement.layers for reader in readers):
            continue
        layer, behind = gm.get_submodule(str(source.target)), [gm.get_submodule(str(r.target)) for r in readers]
        calls = sum(node.op == "call_module" and node.target == source.target for node in gm.graph.nodes)
        alike = all(isinstance(other, _ConvNd) == isinstance(layer, _ConvNd) for other in behind)
        if calls == 1 and alike and {inputs_of(other) for other in behind} == {outputs_of(layer)}:
            names = tuple(str(reader.target) for reader in readers)
            groups.append(ChannelGroup(str(source.target), str(quantizer.target), names))
    return tuple(groups)


def source_layer(placement: Placement, quantizer: fx.Node) -> fx.Node | None:
    """The quantized layer whose output, behind homogeneous operations, is all that `quantizer` reads."""
    gm, node, pools = placement.gm, quantizer.all_input_nodes[0], False
    while node not in placement.layers:
        pool = does(gm, node, _POOL_OPS, _POOLS)
        if len(node.users) != 1 or len(node.all_input_nodes) != 1:
            return None
        if not pool and not does(gm, node, _HOMOGENEOUS_OPS, _HOMOGENEOUS):
            return None
        node, pools = node.all_input_nodes[0], pools or pool
    if len(node.users) != 1 or (pools and not isinstance(gm.get_submodule(str(node.target)), _ConvNd)):
        return None
    return node


def inputs_of(layer: nn.Module) -> int:
    """Channels that a layer reads."""
    return layer.in_channels if isinstance(layer, _ConvNd) else int(layer.in_features)  # type: ignore[arg-type]


def outputs_of(layer: nn.Module) -> int:
    """Channels that a layer writes."""
    return layer.out_channels if isinstance(layer, _ConvNd) else int(layer.out_features)  # type: ignore[arg-type]
