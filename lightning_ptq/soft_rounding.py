"""Numerics of learned rounding: AdaRound's soft rounding, how undecided it is, and gradients straight through.

Everything here computes in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ptq.functional import dot
from lightning_ptq.kernels import kernels_for

# Zeta and gamma of AdaRound's rectified sigmoid (Nagel et al. 2020, eq. 23).
ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """AdaRound's h(alpha) in [0, 1]: how far each weight is rounded up (Nagel et al. 2020, eq. 23)."""
    return _stretch(alpha.sigmoid())


def soft_round(alpha: Tensor, low: Tensor, step: Tensor, log_gain: Tensor) -> tuple[Tensor, Tensor]:
    """A weight whose rounding is being learned, and how far each element of it is rounded up.

    Args:
        alpha, low: shape of the weight.
        step: broadcasts against it; the weight is (low + step * h) * exp(log_gain) with h = rectified_sigmoid(alpha).
        log_gain: broadcasts against it too.

    Returns:
        (weight, h), both with gradients to `alpha`; that to `log_gain` flows through the weight.
    """
    result: tuple[Tensor, Tensor] = _SoftRound.apply(alpha, low, step, log_gain)
    return result


class _SoftRound(torch.autograd.Function):
    """One node of the graph where operation by operation there would be five, each with its own overhead."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, low: Tensor, step: Tensor, log_gain: Tensor) -> tuple[Tensor, Tensor]:
        alike = alpha.shape == low.shape == step.shape and alpha.dim() == log_gain.dim() and alpha.numel() > 0
        plain = all(x.is_contiguous() and x.dtype == alpha.dtype for x in (alpha, low, step, log_gain))
        by_rows = alike and log_gain.numel() == len(log_gain) and len(log_gain) in (1, len(alpha))
        ctx.kernels = kernels = kernels_for(alpha) if by_rows and plain else None
        if kernels is not None:
            weight, h = kernels.soft_round(alpha, low, step, log_gain, ZETA - GAMMA, GAMMA)
            ctx.save_for_backward(alpha, step, log_gain, weight)
            ctx.set_materialize_grads(False)
            return weight, h
        sigmoid, gain = alpha.sigmoid(), log_gain.exp()
        h = _stretch(sigmoid)
        weight = torch.addcmul(low, step, h).mul_(gain)
        ctx.save_for_backward(sigmoid, step, gain, weight)
        ctx.set_materialize_grads(False)
        return weight, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.kernels is not None:
            return _SoftRound._backward(ctx, grad_weight, grad_h)
        sigmoid, step, gain, weight = ctx.saved_tensors
        grad_gain, grad = None, grad_h
        if grad_weight is not None:
            if ctx.needs_input_grad[3]:
                grad_gain = (grad_weight * weight).sum_to_size(gain.shape)
            grad = (grad_weight * gain).mul_(step)
            if grad_h is not None:
                grad.add_(grad_h)
        if grad is None:
            return None, None, None, None
        low, high = -GAMMA / (ZETA - GAMMA), (1.0 - GAMMA) / (ZETA - GAMMA)
        grad = torch.ops.aten.hardtanh_backward(grad, sigmoid, low, high)  # 0 where h is clamped
        return torch.ops.aten.sigmoid_backward(grad, sigmoid).mul_(ZETA - GAMMA), None, None, grad_gain

    @staticmethod
    def _backward(ctx: Any, grad_weight: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        alpha, step, log_gain, weight = ctx.saved_tensors
        if grad_weight is None and grad_h is None:
            return None, None, None, None
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.contiguous()
        grad_h = None if grad_h is None else grad_h.contiguous()
        at = alpha, step, log_gain, weight, grad_weight, grad_h
        grad, grad_gain = ctx.kernels.soft_round_backward(*at, ZETA - GAMMA, GAMMA)
        grad_gain = grad_gain.view(-1, *[1] * (alpha.dim() - 1)).sum_to_size(log_gain.shape)
        return grad, None, None, grad_gain if ctx.needs_input_grad[3] else None


def _stretch(sigmoid: Tensor) -> Tensor:
    return (sigmoid * (ZETA - GAMMA)).add_(GAMMA).clamp_(0.0, 1.0)


def straight_through(rounded: Tensor, x: Tensor) -> Tensor:
    """`rounded`, with the gradient that arrives passed on to `x` as it is. Both of one shape."""
    result: Tensor = _StraightThrough.apply(rounded, x)
    return result


class _StraightThrough(torch.autograd.Function):
    """Not x + (rounded - x).detach(): that sum is not exactly `rounded`."""

    @staticmethod
    def forward(ctx: Any, rounded: Tensor, x: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def undecided(roundings: Sequence[Tensor], beta: float | Tensor) -> Tensor:
    """sum(1 - |2 h - 1| ** beta) over all elements: zero where every h is 0 or 1 (Nagel et al. 2020, eq. 24).

    Args:
        roundings: tensors of any shapes, one at least. Scalar out.
        beta: a number, or a tensor () that holds it.
    """
    result: Tensor = _Undecided.apply(beta, *roundings)
    return result


class _Undecided(torch.autograd.Function):
    """One power for value and gradient together: it is the dearest operation on a weight."""

    @staticmethod
    def forward(ctx: Any, beta: float | Tensor, *roundings: Tensor) -> Tensor:
        ctx.kernels = kernels = kernels_for(roundings[0]) if all(h.is_contiguous() for h in roundings) else None
        ctx.beta = beta
        if kernels is not None:
            ctx.save_for_backward(*roundings)
            total: Tensor = kernels.undecided(roundings, beta)
            return total
        saved, sums = [], []
        for h in roundings:
            u = (h * 2.0).sub_(1.0)
            magnitude = u.abs()
            power = magnitude.pow(beta - 1.0)
            saved += [u, power]
            sums.append(h.numel() - dot(power, magnitude))
        ctx.save_for_backward(*saved)
        return sum(sums[1:], sums[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kernels is not None:
            return None, *(ctx.kernels.undecided_backward(h, ctx.beta, grad) for h in ctx.saved_tensors)
        factor, saved = grad * (-2.0 * ctx.beta), ctx.saved_tensors
        pairs = zip(saved[::2], saved[1::2], strict=True)
        return None, *(torch.copysign(power, u).mul_(factor) for u, power in pairs)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The alpha with rectified_sigmoid(alpha) == h, for h in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1.0)
