"""Keep freed host memory in the process while it calibrates, and give it back afterwards, or where it is scarce.

A calibration step on the CPU allocates and frees the same few megabytes some hundred times. glibc gives blocks of that
size back to the kernel each time, and zeroing the pages anew costs as much as some of the arithmetic on them
(`benchmarks/allocator.py` prints by how much).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Larger blocks are unmapped: kept, they leave holes, which nearly doubled the memory of steps on large images
# (docs/memory.md). So much free memory at the heap's end is kept in any case.
_KEPT_BLOCK, _KEPT_END = 2**27, 2**30


def keep_freed_memory() -> bool:
    """Tell glibc to reuse blocks of up to 128 MiB instead of unmapping them; False where there is no glibc."""
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    return all(mallopt(*option) == 1 for option in ((_M_TRIM_THRESHOLD, _KEPT_END), (_M_MMAP_THRESHOLD, _KEPT_BLOCK)))


def give_back_freed_memory() -> bool:
    """Have glibc give free pages back to the kernel; False where there is no glibc, or nothing to give back."""
    trim = _glibc("malloc_trim")
    return trim is not None and trim(0) == 1


def _glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    return function
