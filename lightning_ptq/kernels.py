"""Which kernels take the elementwise work of a step: `gpu_kernels`, `cpu_kernels`, or torch's operations."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.tape import Watched, recording


def kernels_for(x: Tensor) -> Any:
    """The module of kernels that can take `x`; None where torch's operations have to.

    On a CPU that is so for all but float32, and where there is no C compiler. Kernels see memory, not operations, so
    whoever traces or wraps those gets torch's, but for a tape, to which a kernel is an operation.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    tape = recording()
    if traced or tape is False or type(x) not in (Tensor, nn.Parameter):
        return None
    if x.is_cuda:
        return _gpu_kernels()
    found = cpu_kernels() if x.is_cpu and x.dtype == torch.float32 and not x.is_neg() else None
    return found if found is None or tape is None else Watched(tape, found)


@cache
def cpu_kernels() -> Any:
    """The module `cpu_kernels`, compiled when it is imported; None where that fails."""
    try:
        return import_module("lightning_ptq.cpu_kernels")
    except OSError as error:
        warnings.warn(f"nothing could be compiled, so that steps of calibration take longer: {error}", stacklevel=2)
        return None


@cache
def _gpu_kernels() -> Any:
    if not find_spec("triton"):
        return None
    kernels = import_module("lightning_ptq.gpu_kernels")
    try:  # Triton compiles, and for that it needs a C compiler and a GPU that it knows
        kernels.fake_quantize(torch.zeros(1, device="cuda"), torch.ones((), device="cuda"), 0.0, 1.0, None)
    except Exception as error:
        warnings.warn(f"Triton can't compile here, so that steps take longer: {error}", stacklevel=2)
        return None
    return kernels
