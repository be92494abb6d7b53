"""Squared error between the student's and the teacher's unit output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import mse_loss

from lightning_ptq.functional import binade, dot, is_dense
from lightning_ptq.kernels import kernels_for
from lightning_ptq.losses.base import Term, UnitBatch, channels_first


def reconstruction_loss(student: Tensor, teacher: Tensor, importance: Tensor | None = None) -> Tensor:
    """Squared error summed over channels, mean over batch and positions (BRECQ, QDrop and PD-Quant alike).

    Args:
        student, teacher: (B, C, ...).
        importance: (C,) weight of every channel; None weighs them all 1.
    """
    if importance is None:
        return mse_loss(student.float(), teacher.float()) * student.shape[1]
    teacher, importance = teacher.float(), importance.float()
    alike = student.shape == teacher.shape and student.stride() == teacher.stride() and is_dense(student)
    plain = importance.shape == student.shape[1:2] and importance.is_contiguous()
    kernels = kernels_for(student) if alike and plain else None
    student = student if kernels is not None and student.dtype == torch.bfloat16 else student.float()
    result: Tensor = _WeightedError.apply(student, teacher, importance, kernels)
    return result


def squared_errors(student: Tensor, teacher: Tensor, importance: Tensor | None = None) -> Tensor:
    """`reconstruction_loss` of every image by itself, (B,)."""
    error = (student.float() - teacher.float()).square_()
    if error.dim() > 2:
        error = error.mean(tuple(range(2, error.dim())))  # (B, C)
    return error.sum(1) if importance is None else error @ importance


class _WeightedError(torch.autograd.Function):
    """sum(weights * (student - teacher)^2) over batch and positions' number: four passes in all, where autograd
    would take nine. `kernels` are those of `kernels_for`."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, kernels: Any) -> Tensor:
        ctx.count, ctx.kernels = max(student.numel() // student.shape[1], 1), kernels
        if kernels is not None:
            ctx.save_for_backward(student, teacher, weights)
            total: Tensor = kernels.weighted_error(student, teacher, weights, 1.0 / ctx.count)
            return total
        error = student - teacher
        weighted = error * weights.view(-1, *[1] * (student.dim() - 2))
        ctx.save_for_backward(weighted)
        return dot(error, weighted).div_(ctx.count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        factor = 2.0 / ctx.count
        if ctx.kernels is not None:
            return ctx.kernels.weighted_error_backward(*ctx.saved_tensors, grad, factor), None, None, None
        (weighted,) = ctx.saved_tensors
        return weighted * (grad * factor), None, None, None


class Reconstruction(Term):
    """`reconstruction_loss` of the unit's output and, where calibration is layer-wise, of every inner layer's."""

    recordable = True

    def forward(self, batch: UnitBatch) -> Tensor:
        student, teacher = (channels_first(x, batch.channel_dim) for x in (batch.student_out, batch.teacher_out))
        loss = reconstruction_loss(student, teacher, batch.importance)
        for student, teacher in batch.inner:
            loss = loss + reconstruction_loss(student, teacher)
        return loss


class RelativeReconstruction(Term):
    """Squared error of the unit's output relative to the variance of the teacher's in the batch, times `weight`.

    What it is worth next to a term of another kind then does not depend on the network.
    """

    recordable = True

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, batch: UnitBatch) -> Tensor:
        unit = binade(batch.teacher_out.abs().max().float())
        student, teacher = batch.student_out.float() / unit, batch.teacher_out.float() / unit
        variance = teacher.var(correction=min(1, teacher.numel() - 1))
        return self.weight * mse_loss(student, teacher) / variance.clamp(min=1e-8)
