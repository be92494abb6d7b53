"""The elementwise work of a step as Triton kernels: one pass over a GPU's memory where torch's operations take five.

Imported only where a tensor lies on a GPU, since Triton is part of torch's builds for CUDA on Linux alone. Tensors are
dense, float32 and laid out alike; kernels walk over their memory and know no shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of one program. A sum is made of one number for each program, so that its order is always the same.
_BLOCK = 4096
# Adding and subtracting 1.5 * 2^23 leaves the nearest integer, ties to even; grids end far below.
_ROUND: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _rounded(position, low, high):
    # Comparisons, not minimum and maximum: NaN stays NaN.
    position = tl.where(position < low, low, position)
    position = tl.where(position > high, high, position)
    return (position + _ROUND) - _ROUND


@triton.jit
def _quantize(
    x_at,
    scale_at,
    keep_at,
    y_at,
    low,
    high,
    n,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_at)
    x = tl.load(x_at + i, mask=i < n)
    y = _rounded(tl.div_rn(x, scale), low, high) * scale
    if KEEP:
        y = tl.where(tl.load(keep_at + i, mask=i < n) == 0.0, x, y)
    tl.store(y_at + i, y, mask=i < n)


@triton.jit
def _quantize_backward(
    x_at,
    grad_at,
    scale_at,
    keep_at,
    grad_x_at,
    sums_at,
    low,
    high,
    n,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_at)
    x = tl.load(x_at + i, mask=i < n, other=0.0)
    grad = tl.load(grad_at + i, mask=i < n, other=0.0)
    position = tl.div_rn(x, scale)
    clamped = (position <= low - 0.5) | (position >= high + 0.5)
    moved = _rounded(position, low, high) * scale - tl.where(clamped, 0.0, x)
    if KEEP:
        kept = tl.load(keep_at + i, mask=i < n, other=0.0) == 0.0
        clamped = clamped & (kept == 0)
        moved = tl.where(kept, 0.0, moved)
    tl.store(grad_x_at + i, tl.where(clamped, 0.0, grad), mask=i < n)
    tl.store(sums_at + tl.program_id(0), tl.sum(grad * moved, axis=0))


@triton.jit
def _error(
    student_at,
    teacher_at,
    weights_at,
    sums_at,
    inner,
    channels,
    n,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    error = tl.load(student_at + i, mask=i < n, other=0.0) - tl.load(teacher_at + i, mask=i < n, other=0.0)
    weights = tl.load(weights_at + (i // inner) % channels)
    tl.store(sums_at + tl.program_id(0), tl.sum(weights * error * error, axis=0))


@triton.jit
def _error_backward(
    student_at,
    teacher_at,
    weights_at,
    factor_at,
    grad_at,
    inner,
    channels,
    n,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    error = tl.load(student_at + i, mask=i < n) - tl.load(teacher_at + i, mask=i < n)
    weights = tl.load(weights_at + (i // inner) % channels)
    tl.store(grad_at + i, error * weights * tl.load(factor_at), mask=i < n)


def fake_quantize(x: Tensor, scale: Tensor, low: float, high: float, keep: Tensor | None) -> Tensor:
    """`x` on the grid of `scale` (), or as it is where `keep` is 0; arguments as in `functional.fake_quantize`."""
    y = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _quantize[_grid(x)](
                x, scale, x if keep is None else keep, y, low, high, x.numel(), keep is not None, _BLOCK
            )
    return y


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, low: float, high: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gradient of `x`, sum of `grad` times the derivative of the output by the logarithm of the scale, ())."""
    grad_x, sums = torch.empty_like(x), x.new_zeros(_grid(x))
    if x.numel():
        with torch.cuda.device_of(x):
            other = x if keep is None else keep
            _quantize_backward[_grid(x)](
                x, grad, scale, other, grad_x, sums, low, high, x.numel(), keep is not None, _BLOCK
            )
    return grad_x, sums.sum()


def weighted_error(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """sum(weights * (student - teacher)^2), (); student and teacher (B, C, ...), `weights` (C,)."""
    sums = student.new_zeros(_grid(student))
    if student.numel():
        with torch.cuda.device_of(student):
            _error[_grid(student)](
                student, teacher, weights, sums, _inner(student), student.shape[1], student.numel(), _BLOCK
            )
    return sums.sum()


def weighted_error_backward(student: Tensor, teacher: Tensor, weights: Tensor, factor: Tensor) -> Tensor:
    """weights * (student - teacher) * factor, `factor` (); arguments as in `weighted_error`."""
    grad = torch.empty_like(student)
    if student.numel():
        with torch.cuda.device_of(student):
            _error_backward[_grid(student)](
                student, teacher, weights, factor, grad, _inner(student), student.shape[1], student.numel(), _BLOCK
            )
    return grad


def _grid(x: Tensor) -> tuple[int]:
    """Number of programs."""
    return (-(-x.numel() // _BLOCK),)


def _inner(x: Tensor) -> int:
    """How many elements lie in memory between two channels of `x` (B, C, ...)."""
    return x.stride(1) if x.shape[1] > 1 else 1
