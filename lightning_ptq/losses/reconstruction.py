"""Squared error between the student's and the teacher's unit output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_ptq.losses.base import Term, UnitBatch


def reconstruction_loss(student: Tensor, teacher: Tensor, importance: Tensor | None = None) -> Tensor:
    """Squared error summed over channels, mean over batch and positions (BRECQ, QDrop and PD-Quant alike).

    Args:
        student, teacher: (B, C, ...).
        importance: (C,) weight of every channel; None weighs them all 1.
    """
    if importance is None:
        return mse_loss(student.float(), teacher.float()) * student.shape[1]
    error = student.float() - teacher.float()
    others = [dim for dim in range(error.dim()) if dim != 1]
    return torch.dot((error * error).mean(others), importance)


class Reconstruction(Term):
    """`reconstruction_loss` of the unit's output and, where calibration is layer-wise, of every inner layer's."""

    def forward(self, batch: UnitBatch) -> Tensor:
        loss = reconstruction_loss(batch.student_out, batch.teacher_out, batch.importance)
        for student, teacher in batch.inner:
            loss = loss + reconstruction_loss(student, teacher)
        return loss
