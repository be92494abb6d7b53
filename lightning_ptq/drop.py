"""QDrop's random masks, as a pure function of seeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ptq import functional as F
from lightning_ptq.kernels import kernels_for
from lightning_ptq.seeds import mixed_seed

# A mask is a window of a pool of random elements: the pool is so much longer, and masks start at multiples of a cache
# line's elements.
_SPARE, _ALIGNMENT = 2**18, 16


class DropMask:
    """QDrop's random choice between quantized and float elements (Wei et al. 2022, section 4.2).

    Random numbers are drawn once for each size of tensor, into a pool somewhat longer than it; a mask is a window of
    the pool whose place is drawn anew each time, so that a step costs no random numbers and no pass over the mask. On a
    GPU with Triton there are no masks: a kernel draws an element's number when it comes to it, from a seed in the GPU's
    memory, so that a step that is played back (`replay.py`) draws others each time. All is a pure function of the seeds
    and the order of calls since `seed`.
    """

    def __init__(self, probability: float) -> None:
        self.probability, self.active = probability, True
        self._pools: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._seed_there: Tensor | None = None  # on a GPU, once something was drawn there
        self._pool_seed = self._seed = self._calls = 0

    def seed(self, pool: int, step: int) -> None:
        """Restart the stream of masks for one step; the pools are those of the seed `pool`."""
        if pool != self._pool_seed:
            self.forget()
        self._pool_seed, self._seed, self._calls = pool, step, 0
        if self._seed_there is not None:
            self._seed_there.fill_(step)

    def rewind(self) -> None:
        """Draw for the step in progress from its start."""
        self._calls = 0

    def forget(self) -> None:
        """Drop the pools; they are drawn again when they are needed."""
        self._pools.clear()

    def mix(self, quantized: Tensor, other: Tensor) -> Tensor:
        """Elements of `quantized` where the quantized value is used, else of `other`; no gradients."""
        keep = self.keep(quantized)
        return quantized if keep is None else F.mix(quantized, other, keep)

    def keep(self, x: Tensor) -> Any:
        """What `fake_quantize` takes of `x`. None: everything; a mask: where it is 1; a `Draw`, on a GPU: those."""
        if self.probability == 0.0 or not self.active:
            return None
        kernels = kernels_for(x)
        if kernels is not None and x.is_cuda:
            if self._seed_there is None or self._seed_there.device != x.device:
                self._seed_there = torch.full((), self._seed, dtype=torch.int64, device=x.device)
            self._calls += 1
            return kernels.Draw(self._seed_there, self._calls, 1.0 - self.probability)
        n = x.numel()
        dtype = torch.float32 if kernels is None else torch.uint8  # which kernels read in a quarter of the time
        if (n, x.device, dtype) not in self._pools:
            generator = torch.Generator(x.device).manual_seed(self._pool_seed)
            pool = torch.empty(n + _SPARE, device=x.device).bernoulli_(1.0 - self.probability, generator=generator)
            self._pools[n, x.device, dtype] = pool.to(dtype)
        self._calls += 1
        start = mixed_seed(self._seed, self._calls) % (_SPARE // _ALIGNMENT) * _ALIGNMENT
        return _laid_out_as(self._pools[n, x.device, dtype][start : start + n], x)


def _laid_out_as(flat: Tensor, x: Tensor) -> Tensor:
    """`flat` (numel,) in the shape of `x`, and in its memory layout: operations on both are then one plain pass."""
    return flat.as_strided(x.shape, x.stride(), flat.storage_offset()) if F.is_dense(x) else flat.view(x.shape)
