"""How many dimensions what a traced graph computes has, and whether the first is the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from lightning_ptq.graph.export import unlogged
from lightning_ptq.graph.trace import node_kinds

# So many that hardly anything else is as large.
_IMAGES = 13


class _Noting(fx.Interpreter):
    """Notes the shape of every tensor that a graph computes."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


class _Noted(nn.Module):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.gm = gm

    def forward(self, images: Tensor) -> Any:
        return _Noting(self.gm).run(images)


@torch.no_grad()
def note_shapes(gm: fx.GraphModule, image_shape: Sequence[int]) -> None:
    """Run `gm` without values on images of `image_shape` (C, H, W), as far as it does not go by them.

    The shape may be a guess: neither the number of dimensions nor which is the batch depends on it.
    """
    if "opaque" in node_kinds(gm).values():  # it might keep what it computes here, and need its values later
        return
    state = {f"gm.{k}": v.to("meta") for k, v in (*gm.named_parameters(), *gm.named_buffers())}
    dtype = next((v.dtype for v in state.values() if v.is_floating_point()), torch.float32)
    try:
        with torch.device("meta"), unlogged():
            functional_call(_Noted(gm), state, (torch.zeros(_IMAGES, *image_shape, dtype=dtype),))
    except Exception:  # whatever it does with values or a wrong guess: all behind that is not known
        return


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Shape of what `node` gives, as `torch.export` or `note_shapes` knows it; None if neither does."""
    shape = getattr(node.meta.get("val"), "shape", node.meta.get("shape"))
    return None if shape is None else tuple(shape)


def has_a_row_an_image(node: fx.Node) -> bool:
    """Whether a node's first dimension is the batch, as far as it is known; windows of an image may be rows as well."""
    shape, images = shape_of(node), shape_of(next(iter(node.graph.find_nodes(op="placeholder"))))
    if shape is None or images is None:
        return True
    return len(shape) > 0 and str(shape[0]) == str(images[0])  # symbols: as numbers they have the example's value
