"""Where large tensors lie, on a device, in host memory or in a file, and how one walks over their rows."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_ptq.allocator import give_back_freed_memory
from lightning_ptq.errors import PTQError

Tier = Literal["device", "host", "disk"]
CacheType = Literal["float32", "bfloat16"]
# Images per forward pass where no gradient is needed, and numbers of them: large ones pass a few at a time.
CHUNK, CHUNK_SIZE = 64, 2**24

# What of files this process has mapped into its memory.
_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


class Store:
    """Makes the tensors of one tier.

    A tensor on disk is a memory-mapped file that has no name: it goes with the tensor, or with the process, however
    that ends. All code may take it for a tensor in host memory.

    Args:
        device: where units run.
        tier: where tensors lie. In host memory they are pinned if the device is a GPU.
        folder: for files.
        dtype: "bfloat16" rounds what may be rounded, which halves its size.
    """

    def __init__(
        self, device: torch.device, tier: Tier = "device", folder: Path | None = None, dtype: CacheType = "float32"
    ) -> None:
        self.device, self.tier, self.folder, self.dtype = device, tier, folder, dtype

    def empty(self, shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        """A tensor without values.

        Raises:
            PTQError: the disk has no room for it.
        """
        sizes = [shape[0], *shape[2:], shape[1]] if channels_last else shape
        if self.tier == "disk":
            flat = _in_file(math.prod(sizes), dtype, self.folder)
        elif self.tier == "host":
            flat = torch.empty(math.prod(sizes), dtype=dtype, pin_memory=self.device.type == "cuda")
        else:
            flat = torch.empty(math.prod(sizes), dtype=dtype, device=self.device)
        return flat.view(sizes).permute(0, 3, 1, 2) if channels_last else flat.view(sizes)

    def like(self, x: Tensor) -> Tensor:
        """A tensor without values, of the shape, type and layout of `x`."""
        return self.empty(x.shape, x.dtype, is_channels_last(x))

    def put(self, x: Tensor) -> Tensor:
        """`x` itself if it lies here, else a copy."""
        if self.device.type == "cpu" and self.tier != "disk":
            return x
        result, start = self.like(x), 0
        for some in chunks(x):
            result[start : start + len(some)] = some
            start += len(some)
        return result

    def rounded(self, dtype: torch.dtype) -> torch.dtype:
        """What tensors of `dtype` are rounded to."""
        return torch.bfloat16 if (self.dtype, dtype) == ("bfloat16", torch.float32) else dtype


def _in_file(numel: int, dtype: torch.dtype, folder: Path | None) -> Tensor:
    """A tensor (numel,) in a file without a name."""
    size = numel * dtype.itemsize
    if not size:
        return torch.empty(0, dtype=dtype)
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a write to a mapped page that the disk has no room for kills
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise PTQError(
            f"{str(folder or tempfile.gettempdir())!r} can't hold {readable(size)} of cached activations: "
            f"{error.strerror or error}. Make room, or choose another `cache_folder`."
        ) from error
    _mapped.add(mapped)
    return torch.frombuffer(mapped, dtype=dtype)


def release() -> None:
    """Take what was read of files, or written to them, out of this process's memory."""
    for mapped in list(_mapped) if hasattr(mmap, "MADV_DONTNEED") else ():
        mapped.madvise(mmap.MADV_DONTNEED)


def chunks(x: Tensor, size: int = CHUNK, numbers: int = CHUNK_SIZE) -> Iterator[Tensor]:
    """Slices of at most `size` rows, and of at most so many `numbers` unless one row has more.

    Behind each, what was read of files leaves memory; so does what the heap keeps free, while there are files at all.
    """
    size = max(1, min(size, numbers // max(x[0].numel(), 1))) if len(x) else size
    for start in range(0, len(x), size):
        yield x[start : start + size]
        release()
        if _mapped:  # memory is scarce: holes that blocks of other sizes left would stay, and add up unit by unit
            give_back_freed_memory()


def run_chunked(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    device: torch.device,
    store: Store | None = None,
    exact: bool = True,
) -> Tensor:
    """`function` over all images of `x` (N, ...), some at a time on `device`.

    The result lies in `store`, rounded as that says unless it has to be `exact`; without a store where `x` lies. Its
    memory is laid out as that of the parts. Runs under `no_grad`, not `inference_mode`: calibration takes gradients
    through operations on the result.
    """
    store = Store(x.device) if store is None else store
    result: Tensor | None = None
    with torch.no_grad():
        start = 0
        for some in chunks(x):
            part = function(widened(some.to(device, non_blocking=True)))
            if result is None:
                dtype = part.dtype if exact else store.rounded(part.dtype)
                result = store.empty((len(x), *part.shape[1:]), dtype, is_channels_last(part))
            result[start : start + len(part)] = part
            start += len(part)
    assert result is not None
    return result


def widened(x: Tensor) -> Tensor:
    """`x` as it is computed with."""
    return x.float() if x.dtype == torch.bfloat16 else x


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` lies in memory with its channels last, and not as usual."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def take(x: Tensor, index: Tensor, device: torch.device, into: Tensor | None = None) -> Tensor:
    """Rows `index` (B,) of `x` (N, ...) on `device`, laid out as `x` is.

    Args:
        index: where `x` is.
        into: what an earlier call for the same number of rows gave, which is written to then.
    """
    last, here = is_channels_last(x), x.device.type == device.type
    x = x.permute(0, 2, 3, 1) if last else x  # index_select alone would copy each row element by element
    into = into.permute(0, 2, 3, 1) if into is not None and last else into
    if here and (into is None or into.dtype == x.dtype):
        rows = torch.index_select(x, 0, index, out=into)
    else:  # a pinned buffer, which the allocator does not give away again before the copy has been made
        pinned = device.type == "cuda" and not here
        rows = torch.empty((len(index), *x.shape[1:]), dtype=x.dtype, device=x.device, pin_memory=pinned)
        torch.index_select(x, 0, index, out=rows)
        rows = rows.to(device, non_blocking=True) if into is None else into.copy_(rows, non_blocking=True)
    release()
    return widened(rows.permute(0, 3, 1, 2) if last else rows)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x`, which lies in host memory, on `device`; neither waits for the other."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def readable(size: int) -> str:
    """So many bytes in a unit that suits."""
    power = min(int(math.log2(max(size, 1))) // 10, 4)
    return f"{size / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
