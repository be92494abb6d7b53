"""Squared error between the student's and the teacher's unit output."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_ptq.losses.base import Term, UnitBatch


def reconstruction_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error summed over channels, mean over batch and positions (BRECQ, QDrop and PD-Quant alike).

    Shapes: both (B, C, ...), scalar out.
    """
    channels = student.shape[1]
    return mse_loss(student.float(), teacher.float()) * channels


class Reconstruction(Term):
    """`reconstruction_loss` of the unit's output and, where calibration is layer-wise, of every inner layer's."""

    def forward(self, batch: UnitBatch) -> Tensor:
        loss = reconstruction_loss(batch.student_out, batch.teacher_out)
        for student, teacher in batch.inner:
            loss = loss + reconstruction_loss(student, teacher)
        return loss
