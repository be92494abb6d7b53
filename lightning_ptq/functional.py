"""Numerics of uniform affine quantization: integer grids, fake-quantization and its gradients.

A quantizer with `bits` maps a real x to the integer clamp(round(x / scale) + zero_point, qmin, qmax) and back to
(integer - zero_point) * scale. Everything here computes in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ptq.kernels import kernels_for

# Smallest scale a quantizer may have: dividing by it stays finite in float32 for any finite activation of a network.
MIN_SCALE = 1e-8


def in_float32(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast on `device`; next to nothing where none is on, which entering one would cost."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """(qmin, qmax) of the grid: signed when symmetric, unsigned otherwise."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def qparams(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose grid covers [low, high] and contains 0 exactly.

    Args:
        low, high: ends of the real range, any equal shape.

    Returns:
        (scale, zero_point), float32 of that shape; the zero point holds integers. The scale is finite and positive
        even for an empty range (constant zero input).
    """
    qmin, qmax = integer_range(bits, symmetric)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if symmetric:
        scale = (torch.maximum(-low / -qmin, high / qmax)).clamp(min=MIN_SCALE)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (qmax - qmin)).clamp(min=MIN_SCALE)
    return scale, (qmin - torch.round(low / scale)).clamp(qmin, qmax)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Integers (as float32) of `x`; `scale` and `zero_point` broadcast against it."""
    return torch.round(x / scale).add_(zero_point).clamp_(qmin, qmax)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values of the integers `q`."""
    return (q - zero_point) * scale


def binade(x: Tensor) -> Tensor:
    """The power of two at or next below every positive number of `x`; 1 for 0.

    Dividing by it changes no bit but those of the exponent, so that squares neither overflow nor vanish.
    """
    return torch.where(x > 0, x / (2.0 * torch.frexp(x).mantissa), 1.0)


def saturated(y: Tensor, dtype: torch.dtype) -> Tensor:
    """`y` (float32) as `dtype`. A grid may end beyond the largest number of float16, which then stands for its end."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        y = y.clamp(-limit, limit)
    return y.to(dtype)


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """A convolution's weight (O, I/groups, ...) as that of a transposed convolution (I, O/groups, ...), or back."""
    return weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def fake_quantize(
    x: Tensor,
    log_scale: Tensor,
    low: float,
    high: float,
    keep: Any = None,
) -> Tensor:
    """Quantize and dequantize a tensor with one scale, with the gradients of LSQ (Esser et al. 2020, eq. 3).

    The scale is learned by its logarithm: steps are then relative to the scale, so one learning rate fits every layer
    of every network, and the scale can't become zero or negative.

    Args:
        x: any shape.
        log_scale: natural logarithm of the scale, shape ().
        low, high: the grid's ends relative to its zero point, qmin - zero_point and qmax - zero_point.
        keep: mask of x's shape holding 0 and 1; where 0 the element stays in full precision (QDrop, Wei et al. 2022).
            On a GPU with Triton it is a `gpu_kernels.Draw` of the elements that are quantized.

    Returns:
        float32 tensor of x's shape, or bfloat16 where kernels take that. Gradients: to x straight through inside the
        grid, zero outside; to log_scale sum(g * (y - x)) over the quantized elements inside the grid and sum(g * y)
        outside, divided by sqrt(number of elements * number of steps of the grid's larger side) as LSQ does.
    """
    x = x if x.dtype == torch.bfloat16 and kernels_for(x) is not None else x.float()
    result: Tensor = _FakeQuantize.apply(x, log_scale, low, high, keep)
    return result


class _FakeQuantize(torch.autograd.Function):
    """One pass over x in each direction by kernels, else a few, without boolean masks: on the CPU a `where` costs as
    much as twenty arithmetic passes. Saves x; without kernels y too, which neighbours keep alive anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, low: float, high: float, keep: Any) -> Tensor:
        scale, kernels = log_scale.exp(), kernels_for(x)
        ctx.low, ctx.high, ctx.kernels = low, high, kernels
        if kernels is not None:
            scale = scale.float()  # a network in float64 has such scales too
            x = x if is_dense(x) else x.contiguous()
            ctx.keep = keep = laid_out_as(keep, x).to(torch.uint8) if isinstance(keep, Tensor) else keep
            ctx.save_for_backward(x, scale)
            result: Tensor = kernels.fake_quantize(x, scale, low, high, keep)
            return result
        # Integers relative to the zero point save the two passes that would add and subtract it.
        y = (x / scale).round_().clamp_(low, high).mul_(scale)
        if keep is not None:
            keep = keep.to(x.dtype)
            y = torch.lerp(x, y, keep)  # exact for 0 and 1
        ctx.save_for_backward(x, y, scale, keep)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0]
        # From a slice or padding: one copy, or each pass would be many times as long.
        grad = laid_out_as(grad, x)
        factor = (max(x.numel(), 1) * max(-ctx.low, ctx.high)) ** -0.5
        if ctx.kernels is not None:
            at = grad, *ctx.saved_tensors, ctx.low, ctx.high, ctx.keep, factor
            grad_x, total = ctx.kernels.fake_quantize_backward(*at)
            return grad_x, total if ctx.needs_input_grad[1] else None, None, None, None
        _, y, scale, keep = ctx.saved_tensors
        position = x / scale
        if keep is not None:
            position.mul_(keep)  # 0 lies inside every grid: what was not quantized passes its gradient on
        # The gradient inside the grid and zero where the integer was clamped.
        grad_x = torch.ops.aten.hardtanh_backward(grad, position, ctx.low - 0.5, ctx.high + 0.5)
        grad_log_scale = None
        if ctx.needs_input_grad[1]:
            grad_log_scale = (dot(grad, y) - dot(grad_x, x)) * factor
        return grad_x, grad_log_scale, None, None, None


def mix(drawn: Tensor, other: Tensor, keep: Any) -> Tensor:
    """Elements of `drawn` where `keep`, as in `fake_quantize`, takes them, else of `other`, a tensor like it.

    Without gradients on a GPU, and where both are float32.
    """
    if not isinstance(keep, Tensor):
        return keep.mix(drawn, laid_out_as(other, drawn))  # type: ignore[no-any-return]
    kernels = kernels_for(drawn) if drawn.dtype == other.dtype and is_dense(drawn) else None
    if kernels is None:
        return torch.lerp(other, drawn, keep.to(other.dtype))
    at = drawn, laid_out_as(other, drawn), laid_out_as(keep, drawn).to(torch.uint8)
    return kernels.mix(*at)  # type: ignore[no-any-return]


def laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """`y`, copied if its memory is not laid out as that of `x`, which has its shape."""
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """sum(a * b) without a temporary of their size if both are laid out alike and without gaps."""
    if is_dense(a) and a.stride() == b.stride():
        return torch.dot(_in_memory_order(a), _in_memory_order(b))
    return torch.dot(a.flatten(), b.flatten())


def is_dense(x: Tensor) -> bool:
    """Whether the elements of `x` fill their memory in one of the two usual layouts."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _in_memory_order(x: Tensor) -> Tensor:
    return x.as_strided((x.numel(),), (1,))
