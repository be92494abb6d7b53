"""Whether the chain of units computes what the model does that it was made of: tried, whatever rewrote the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.errors import PTQError
from lightning_ptq.graph.pack import pack_of
from lightning_ptq.graph.trace import pick_output
from lightning_ptq.graph.units import Chain

# Largest difference relative to the output that is rounding, in float32 and where products are rounded more (TF32).
_FLOAT32, _LESS = 1e-3, 1e-2


@torch.no_grad()
def check_chain(model: nn.Module, chain: Chain, shapes: Sequence[Sequence[int]]) -> None:
    """Compare both on two images of noise, of the first of `shapes` (C, H, W) that the model takes.

    Raises:
        PTQError: their outputs differ, or a unit overwrites what it reads, which the caches hold.
    """
    model = deepcopy(model)  # it may count its calls, or keep something for images of a size
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    for shape in shapes:
        noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(like)
        wanted = _output(model, chain, noise.clone())
        if wanted is not None and wanted.isfinite().all():
            break
    else:
        return
    x = noise
    for name, unit in zip(chain.names, chain.units, strict=True):
        given = x.clone()
        try:
            out = unit(x)
        except Exception:  # told where shapes are worked out, by the unit's name and for the user's own images
            return
        if not torch.equal(x, given):
            raise PTQError(
                f"{type(model).__name__}: unit {name!r} overwrites what it reads, which is kept for other steps: a "
                "module that is kept whole or a wrapped function in it works in place. Have it work on a copy."
            )
        x = out
    exact = like.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    if x.shape == wanted.shape and _distance(x, wanted) <= (_FLOAT32 if exact else _LESS):
        return
    again = _output(model, chain, noise.clone())
    if again is not None and torch.equal(again, wanted):  # else it gives something else each time
        differ = f"by {_distance(x, wanted):.1%}" if x.shape == wanted.shape else f"{tuple(x.shape)} in shape"
        raise PTQError(
            f"the units made of {type(model).__name__} give something else than it does: {differ}, on two images of "
            f"noise of shape {tuple(shape)}. Its Python goes by values or types, or overwrites tensors in a way that "
            "no graph shows. Write it without that, or keep the module that does so whole with leaf_modules."
        )


def _output(model: nn.Module, chain: Chain, images: Tensor) -> Tensor | None:
    """What the model gives, as the chain would return it; None if it can't take the images."""
    try:
        output: Any = model(images)
    except Exception:
        return None
    pack = pack_of(chain)
    if pack is not None:
        output = pack(*(output.values() if isinstance(output, Mapping) else output))
    picked = pick_output(output)
    return picked.cpu().double() if isinstance(picked, Tensor) else None


def _distance(x: Tensor, wanted: Tensor) -> float:
    return float((x.cpu().double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
