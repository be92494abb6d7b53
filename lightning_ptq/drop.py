"""QDrop's random masks, as a pure function of seeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ptq import functional as F
from lightning_ptq import kernels
from lightning_ptq.seeds import mixed_seed
from lightning_ptq.tape import recording

# A mask is a window of a pool of random elements: the pool is so much longer, and masks start at multiples of a cache
# line.
_SPARE, _ALIGNMENT = 2**18, 16


class DropMask:
    """QDrop's random choice between quantized and float elements (Wei et al. 2022, section 4.2).

    Random numbers are drawn once for each size of tensor, into a pool somewhat longer than it; a mask is a window of
    the pool, so that a step costs no random numbers and no pass over the mask. The windows of a step are moved for the
    next one, where a step that is played back (`replay.py`) finds them. On a GPU with Triton there are no masks: a
    kernel draws an element's number when it comes to it, from a seed in the GPU's memory. All is a pure function of
    the seeds and the order of calls since `seed`; a mask is good until the next `seed`.
    """

    def __init__(self, probability: float) -> None:
        self.probability, self.active = probability, True
        self._pools: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._windows: dict[int, Tensor] = {}  # by the number of the call that gave it
        self._seed_there: Tensor | None = None  # on a GPU, once something was drawn there
        self._pool_seed = self._seed = self._calls = 0

    def seed(self, pool: int, step: int) -> None:
        """Restart the stream of masks for one step, if it is `active`; the pools are those of the seed `pool`."""
        if pool != self._pool_seed:
            self.forget()
        self._pool_seed, self._seed, self._calls = pool, step, 0
        for call, window in self._windows.items() if self.active else ():
            self._move(call, window, window.shape, window.stride())
        if self._seed_there is not None:
            self._seed_there.fill_(step)

    def rewind(self) -> None:
        """Draw for the step in progress from its start."""
        self._calls = 0

    def forget(self) -> None:
        """Drop the pools; they are drawn again when they are needed."""
        self._pools.clear()
        self._windows.clear()

    def mix(self, quantized: Tensor, other: Tensor) -> Tensor:
        """Elements of `quantized` where the quantized value is used, else of `other`; no gradients."""
        keep = self.keep(quantized)
        return quantized if keep is None else F.mix(quantized, other, keep)

    def keep(self, x: Tensor) -> Any:
        """What `fake_quantize` takes of `x`. None: everything; a mask: where it is 1; a `Draw`, on a GPU: those."""
        if self.probability == 0.0 or not self.active:
            return None
        found = kernels.kernels_for(x)
        if found is not None and x.is_cuda:
            if self._seed_there is None or self._seed_there.device != x.device:
                self._seed_there = torch.full((), self._seed, dtype=torch.int64, device=x.device)
            self._calls += 1
            return found.Draw(self._seed_there, self._calls, 1.0 - self.probability)
        self._calls += 1
        window = self._windows.get(self._calls)
        dtype = torch.uint8 if x.is_cpu and kernels.cpu_kernels() is not None else torch.float32
        stride = x.stride() if F.is_dense(x) else torch.empty(x.shape, device="meta").stride()
        if window is None or (window.shape, window.stride(), window.dtype) != (x.shape, stride, dtype):
            if tape := recording():  # none of the steps before it had this window
                tape.faithful = False
            window = self._windows[self._calls] = torch.empty(0, dtype=dtype, device=x.device)
            self._move(self._calls, window, x.shape, stride)
        return window

    def _move(self, call: int, window: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> None:
        """Have `window` be the mask of this call, of this shape and in this memory layout."""
        start = mixed_seed(self._seed, call) % (_SPARE // _ALIGNMENT) * _ALIGNMENT
        pool = self._pool(shape.numel(), window)
        window.set_(pool.untyped_storage(), start, shape, stride)

    def _pool(self, n: int, like: Tensor) -> Tensor:
        """Random elements for masks of `n`, of the type of `like`; bytes are what kernels read soonest."""
        key = n, like.device, like.dtype
        if key not in self._pools:
            generator = torch.Generator(like.device).manual_seed(self._pool_seed)
            pool = torch.empty(n + _SPARE, device=like.device)
            self._pools[key] = pool.bernoulli_(1.0 - self.probability, generator=generator).to(like.dtype)
        return self._pools[key]
