"""Ends of layers inside a unit: how layer-wise calibration reaches a layer where the network can't be cut behind it.

Between the branches of a residual block several tensors are alive, so a block is the smallest unit there. A tap marks
where a layer of such a unit ends; layer-wise calibration compares student and teacher at every tap and lets no gradient
through, so that each layer answers for its own output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Tap(nn.Module):
    """The identity; inside `recorded` it also keeps its input and stops the gradient.

    Args:
        channel_dim: which dimension of its input is that of channels: 1, or -1 behind a linear layer.

    Shape: any -> the same.
    """

    def __init__(self, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.values: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.values is None:
            return x
        self.values.append(x if x.dim() < 3 else x.movedim(self.channel_dim, 1))
        return x.detach()


@contextmanager
def recorded(unit: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, every tap of `unit` appends what passes through it, (B, C, ...), to the list that is yielded."""
    taps, values = [m for m in unit.modules() if isinstance(m, Tap)], list[Tensor]()
    try:
        for tap in taps:
            tap.values = values
        yield values
    finally:
        for tap in taps:
            tap.values = None
