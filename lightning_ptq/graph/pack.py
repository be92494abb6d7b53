"""Several outputs as one tensor: a chain goes from tensor to tensor, a feature pyramid gives a dict of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import pad

from lightning_ptq.errors import PTQError


class Pack(nn.Module):
    """Puts the positions of all outputs side by side; inside `unpacked` it also keeps the outputs.

    Channels that an output has not are zeros.

    Args:
        count: how many outputs there are.
        keys: what the model calls them, in a dict; None if it returns a tuple or list. kind: that type.

    Shape: each (N, C_i, positions...) -> (N, max C_i, sum of positions).
    """

    def __init__(
        self, count: int, keys: tuple[Any, ...] | None, kind: type[list[Any]] | type[tuple[Any, ...]] = tuple
    ) -> None:
        super().__init__()
        self.keys, self.kind = keys, kind
        # Names of the outputs, for files.
        self.names = tuple(f"output_{i}" for i in range(count)) if keys is None else tuple(map(str, keys))
        self.outputs: list[Tensor] | None = None

    def forward(self, *outputs: Tensor) -> Tensor:
        if self.outputs is not None:
            self.outputs.extend(outputs)
        if any(x.dim() < 2 for x in outputs):
            raise PTQError(
                "the part gives a tensor without channels: its outputs must be (N, C, ...). Name another part."
            )
        flat = [x.flatten(2) if x.dim() > 2 else x[:, :, None] for x in outputs]
        widest = max(x.shape[1] for x in flat)
        return torch.cat([pad(x, (0, 0, 0, widest - x.shape[1])) for x in flat], dim=2)

    def structured(self, outputs: Sequence[Any]) -> Any:
        """The outputs as the model returns them."""
        return self.kind(outputs) if self.keys is None else dict(zip(self.keys, outputs, strict=True))


def pack_outputs(gm: fx.GraphModule) -> None:
    """Make a graph that returns a dict, tuple or list of tensors return them packed.

    Raises:
        PTQError: there is something else among the outputs.
    """
    end = gm.graph.output_node()
    outputs = end.args[0]
    if isinstance(outputs, fx.Node):
        return
    keys = tuple(outputs) if isinstance(outputs, Mapping) else None
    values = tuple(outputs.values()) if isinstance(outputs, Mapping) else outputs
    if not isinstance(values, list | tuple) or not values or not all(isinstance(v, fx.Node) for v in values):
        raise PTQError("the part returns something else than a tensor, or a flat dict, tuple or list of tensors.")
    gm.add_submodule("packed_outputs", Pack(len(values), keys, list if isinstance(values, list) else tuple))
    with gm.graph.inserting_before(end):
        packed = gm.graph.call_module("packed_outputs", tuple(values))
    end.args = (packed,)
    gm.recompile()


def pack_of(module: nn.Module) -> Pack | None:
    """The `Pack` of a network, if it has several outputs."""
    return next((m for m in module.modules() if isinstance(m, Pack)), None)


@contextmanager
def unpacked(pack: Pack) -> Iterator[list[Tensor]]:
    """Inside, the list that is yielded gets the outputs of the network that `pack` belongs to."""
    outputs: list[Tensor] = []
    pack.outputs = outputs
    try:
        yield outputs
    finally:
        pack.outputs = None
