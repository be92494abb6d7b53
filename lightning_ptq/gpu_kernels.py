"""The elementwise work of a step as Triton kernels: one pass over a GPU's memory where torch's operations take five.

Imported only where a tensor lies on a GPU, since Triton is part of torch's builds for CUDA on Linux alone. Tensors are
dense and laid out alike, so that kernels walk over their memory and know little of shapes. All is computed in float32;
activations may be bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# What computes here, beside torch.
VERSION = f"triton {triton.__version__}"
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
def _drawn(seed_at, call, threshold, BLOCK: tl.constexpr):
    """Which elements of this program's block are drawn: 16 random bits of each are below the threshold.

    Philox (Salmon et al. 2011) is a function of its counter, so that every kernel finds the same ones: one call for
    eight elements.
    """
    counter = (tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)).to(tl.uint32)
    zero = counter * 0
    a, b, c, d = tl.philox(tl.load(seed_at), counter, zero + call, zero, zero, 7)
    words = tl.interleave(tl.interleave(a, b), tl.interleave(c, d))
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) < threshold


@triton.jit
def _quantize(x_at, scale_at, seed_at, y_at, call, threshold, low, high, n, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_at)
    x = tl.load(x_at + i, mask=i < n).to(tl.float32)
    y = _rounded(tl.div_rn(x, scale), low, high) * scale
    if KEEP:
        y = tl.where(_drawn(seed_at, call, threshold, BLOCK), y, x)
    tl.store(y_at + i, y, mask=i < n)


@triton.jit
def _quantize_backward(
    x_at,
    grad_at,
    scale_at,
    seed_at,
    grad_x_at,
    sums_at,
    call,
    threshold,
    low,
    high,
    n,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_at)
    x = tl.load(x_at + i, mask=i < n, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + i, mask=i < n, other=0.0).to(tl.float32)
    position = tl.div_rn(x, scale)
    clamped = (position <= low - 0.5) | (position >= high + 0.5)
    moved = _rounded(position, low, high) * scale - tl.where(clamped, 0.0, x)
    if KEEP:
        quantized = _drawn(seed_at, call, threshold, BLOCK)
        clamped = clamped & quantized
        moved = tl.where(quantized, moved, 0.0)
    tl.store(grad_x_at + i, tl.where(clamped, 0.0, grad), mask=i < n)
    tl.store(sums_at + tl.program_id(0), tl.sum(grad * moved, axis=0))


@triton.jit
def _mix(drawn_at, other_at, seed_at, out_at, call, threshold, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(drawn_at + i, mask=i < n), tl.load(other_at + i, mask=i < n)
    tl.store(out_at + i, tl.where(_drawn(seed_at, call, threshold, BLOCK), a, b), mask=i < n)


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
    student = tl.load(student_at + i, mask=i < n, other=0.0).to(tl.float32)
    error = student - tl.load(teacher_at + i, mask=i < n, other=0.0)
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
    error = tl.load(student_at + i, mask=i < n).to(tl.float32) - tl.load(teacher_at + i, mask=i < n)
    weights = tl.load(weights_at + (i // inner) % channels)
    tl.store(grad_at + i, error * weights * tl.load(factor_at), mask=i < n)


@triton.jit
def _soft_round(
    alpha_at,
    low_at,
    step_at,
    log_gain_at,
    weight_at,
    h_at,
    inner,
    channels,
    n,
    SPAN: tl.constexpr,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sigmoid = tl.sigmoid(tl.load(alpha_at + i, mask=i < n, other=0.0))
    h = sigmoid * SPAN + START
    h = tl.where(h < 0.0, 0.0, h)  # as in `_rounded`
    h = tl.where(h > 1.0, 1.0, h)
    gain = tl.exp(tl.load(log_gain_at + (i // inner) % channels))
    weight = (tl.load(low_at + i, mask=i < n) + tl.load(step_at + i, mask=i < n) * h) * gain
    tl.store(weight_at + i, weight, mask=i < n)
    tl.store(h_at + i, h, mask=i < n)


@triton.jit
def _soft_round_backward(
    alpha_at,
    step_at,
    log_gain_at,
    weight_at,
    grad_weight_at,
    grad_h_at,
    grad_alpha_at,
    grad_gain_at,
    size,
    CHANNELS: tl.constexpr,
    UNDECIDED: tl.constexpr,
    SPAN: tl.constexpr,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program for each output channel, whose `size` weights lie together.
    channel = tl.program_id(0)
    gain = tl.exp(tl.load(log_gain_at + (channel if CHANNELS else 0)))
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        j = first + tl.arange(0, BLOCK)
        i = channel.to(tl.int64) * size + j
        sigmoid = tl.sigmoid(tl.load(alpha_at + i, mask=j < size, other=0.0))
        grad_weight = tl.load(grad_weight_at + i, mask=j < size, other=0.0)
        total += grad_weight * tl.load(weight_at + i, mask=j < size, other=0.0)
        grad = grad_weight * gain * tl.load(step_at + i, mask=j < size, other=0.0)
        if UNDECIDED:
            grad += tl.load(grad_h_at + i, mask=j < size, other=0.0)
        stretched = sigmoid * SPAN + START
        clamped = (stretched <= 0.0) | (stretched >= 1.0)
        grad = tl.where(clamped, 0.0, grad * sigmoid * (1.0 - sigmoid) * SPAN)
        tl.store(grad_alpha_at + i, grad, mask=j < size)
    tl.store(grad_gain_at + channel, tl.sum(total, axis=0))


@triton.jit
def _undecided(h_at, beta_at, sums_at, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    distance = tl.abs(2.0 * tl.load(h_at + i, mask=i < n, other=0.0) - 1.0)
    # The logarithm of 0 is -inf, and 2 to that 0.
    tl.store(sums_at + tl.program_id(0), tl.sum(1.0 - tl.exp2(tl.log2(distance) * tl.load(beta_at)), axis=0))


@triton.jit
def _undecided_backward(h_at, beta_at, grad_at, grad_h_at, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u, beta = 2.0 * tl.load(h_at + i, mask=i < n, other=0.0) - 1.0, tl.load(beta_at)
    power = tl.exp2(tl.log2(tl.abs(u)) * (beta - 1.0))
    grad = tl.load(grad_at) * -2.0 * beta * tl.where(u < 0.0, -power, power)
    tl.store(grad_h_at + i, grad, mask=i < n)


@dataclass(frozen=True)
class Draw:
    """A random choice of a tensor's elements, which kernels make where they need it.

    Attributes:
        seed: of the step, int64 () on the GPU. call: number of the choice within it.
        probability: of an element's being drawn, in steps of 2^-16.
    """

    seed: Tensor
    call: int
    probability: float

    @property
    def key(self) -> tuple[int, int]:
        """What kernels are told beside the seed: the choice's number, and the threshold of 16 bits."""
        return self.call, round(self.probability * 2**16)

    def mask(self, x: Tensor) -> Tensor:
        """1 for the drawn elements of `x`, else 0."""
        return self.mix(torch.ones_like(x), torch.zeros_like(x))

    def mix(self, drawn: Tensor, other: Tensor) -> Tensor:
        """Elements of `drawn` where they are drawn, else of `other`; both laid out alike."""
        out = torch.empty_like(drawn)
        if out.numel():
            with torch.cuda.device_of(out):
                _mix[_grid(out)](drawn, other, self.seed, out, *self.key, out.numel(), _BLOCK)
        return out


def fake_quantize(x: Tensor, scale: Tensor, low: float, high: float, keep: Draw | None) -> Tensor:
    """`x` on the grid of `scale` (), or as it is where it is not drawn; arguments as in `functional.fake_quantize`.

    Computed in float32 and given in the type of `x`.
    """
    y = torch.empty_like(x)
    if x.numel():
        seed, key = (x, (0, 0)) if keep is None else (keep.seed, keep.key)
        with torch.cuda.device_of(x):
            _quantize[_grid(x)](x, scale, seed, y, *key, low, high, x.numel(), keep is not None, _BLOCK)
    return y


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, low: float, high: float, keep: Draw | None, factor: float
) -> tuple[Tensor, Tensor]:
    """(gradient of `x`, `factor` times the sum of `grad` times the output's derivative by the log scale, ())."""
    grad_x, sums = torch.empty_like(x), scale.new_zeros(_grid(x))
    if x.numel():
        seed, key = (x, (0, 0)) if keep is None else (keep.seed, keep.key)
        with torch.cuda.device_of(x):
            at = x, grad, scale, seed, grad_x, sums
            _quantize_backward[_grid(x)](*at, *key, low, high, x.numel(), keep is not None, _BLOCK)
    return grad_x, sums.sum() * factor


def weighted_error(student: Tensor, teacher: Tensor, weights: Tensor, factor: float) -> Tensor:
    """`factor` times the sum of weights * (student - teacher)^2, (), in float32.

    Student and teacher are (B, C, ...), `weights` (C,).
    """
    sums = teacher.new_zeros(_grid(student))
    if student.numel():
        with torch.cuda.device_of(student):
            _error[_grid(student)](
                student, teacher, weights, sums, _inner(student), student.shape[1], student.numel(), _BLOCK
            )
    return sums.sum() * factor


def weighted_error_backward(student: Tensor, teacher: Tensor, weights: Tensor, grad: Tensor, factor: float) -> Tensor:
    """weights * (student - teacher) * grad * factor, `grad` (); other arguments as in `weighted_error`."""
    out, scaled = torch.empty_like(student), grad * factor
    if student.numel():
        with torch.cuda.device_of(student):
            _error_backward[_grid(student)](
                student, teacher, weights, scaled, out, _inner(student), student.shape[1], student.numel(), _BLOCK
            )
    return out


def soft_round(
    alpha: Tensor, low: Tensor, step: Tensor, log_gain: Tensor, span: float, start: float
) -> tuple[Tensor, Tensor]:
    """(weight, h) as in `soft_rounding.soft_round`, h = clamp(span * sigmoid(alpha) + start, 0, 1).

    All are contiguous, and `alpha`, `low` and `step` of one shape (O, ...); `log_gain` holds O numbers, or one.
    """
    weight, h, n = torch.empty_like(alpha), torch.empty_like(alpha), alpha.numel()
    with torch.cuda.device_of(alpha):
        _soft_round[_grid(alpha)](
            alpha, low, step, log_gain, weight, h, n // len(alpha), log_gain.numel(), n, span, start, _BLOCK
        )
    return weight, h


def soft_round_backward(
    alpha: Tensor,
    step: Tensor,
    log_gain: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_h: Tensor | None,
    span: float,
    start: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `alpha` and, summed over each output channel (O,), of `log_gain`."""
    grad_alpha, grad_gain = torch.empty_like(alpha), alpha.new_empty(len(alpha))
    size = alpha.numel() // len(alpha)
    block = min(_BLOCK, triton.next_power_of_2(size))
    with torch.cuda.device_of(alpha):
        other, channels = alpha if grad_h is None else grad_h, log_gain.numel() > 1
        at = alpha, step, log_gain, weight, grad_weight, other, grad_alpha, grad_gain
        _soft_round_backward[(len(alpha),)](*at, size, channels, grad_h is not None, span, start, block)
    return grad_alpha, grad_gain


def undecided(roundings: Sequence[Tensor], beta: float | Tensor) -> Tensor:
    """sum(1 - |2 h - 1| ** beta) over all elements of contiguous tensors, (); a recording's `beta` lies on the GPU."""
    beta = _there(beta, roundings[0])
    programs = [_grid(h)[0] for h in roundings]
    sums = roundings[0].new_empty(sum(programs))
    with torch.cuda.device_of(sums):
        for h, part in zip(roundings, sums.split(programs), strict=True):
            # What lies behind the end is decided: it counts nothing.
            _undecided[_grid(h)](h, beta, part, h.numel(), _BLOCK)
    return sums.sum()


def undecided_backward(h: Tensor, beta: float | Tensor, grad: Tensor) -> Tensor:
    """Gradient of `h` where that of `undecided` is `grad` ()."""
    grad_h, beta = torch.empty_like(h), _there(beta, h)
    with torch.cuda.device_of(h):
        _undecided_backward[_grid(h)](h, beta, grad, grad_h, h.numel(), _BLOCK)
    return grad_h


def _there(beta: float | Tensor, h: Tensor) -> Tensor:
    return beta if isinstance(beta, Tensor) else h.new_tensor(beta)


def _grid(x: Tensor) -> tuple[int]:
    """Number of programs."""
    return (-(-x.numel() // _BLOCK),)


def _inner(x: Tensor) -> int:
    """How many elements lie in memory between two channels of `x` (B, C, ...)."""
    return x.stride(1) if x.shape[1] > 1 else 1
