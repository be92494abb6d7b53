"""Transposed convolutions: weights laid out as those of convolutions, and outputs of a size that the graph names."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_ptq.layers import ConvTranspose

_TORCH = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def lay_out_transposed(gm: fx.GraphModule) -> None:
    """Replace torch's transposed convolutions by `ConvTranspose`, which can be folded and quantized, in place.

    One whose weight the graph reads as well stays, and says so in `meta["float_reason"]`.
    """
    read = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    for node in gm.graph.nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) not in _TORCH:
            continue
        assert isinstance(module, _ConvTransposeNd)
        if f"{node.target}.weight" in read:
            node.meta["float_reason"] = f"{type(module).__name__}: its weight is also read by other operations"
        else:
            gm.set_submodule(str(node.target), ConvTranspose.from_torch(module))


def crop_transposed(gm: fx.GraphModule) -> None:
    """Write `output_size` of transposed convolutions as a slice of the largest output that it may ask for, in place.

    A layer then reads one tensor. Output padding only appends, so that what remains is what it was. Comes after the
    batch norms behind were folded, and after calls were untied.
    """
    for node in gm.graph.nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, ConvTranspose):
            continue
        size: Any = node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else None)
        node.args, node.kwargs = (node.args[0] if node.args else node.kwargs["input"],), {}
        if size is None:
            continue
        module.output_padding = tuple(stride - 1 for stride in module.stride)
        dims, readers = len(module.kernel_size), list(node.users)
        with gm.graph.inserting_before(node.next):
            ends = [
                gm.graph.call_function(operator.getitem, (size, dim)) if isinstance(size, fx.Node) else size[dim]
                for dim in range(-dims, 0)
            ]
            index: Any = (..., *(slice(None, end) for end in ends))
            sliced = gm.graph.call_function(operator.getitem, (node, index))
        sliced.meta = dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, sliced)
    gm.recompile()
