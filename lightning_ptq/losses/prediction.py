"""What the network as a whole should keep: its predictions, and the features that its head reads."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ptq.losses.base import Term, UnitBatch
from lightning_ptq.losses.critic import pooled


def prediction_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) in nats of the class distributions, mean over batch and positions (Hinton et al. 2015).

    Args:
        student, teacher: logits (B, classes, ...). One class has no distribution: then it is the squared error.
    """
    if student.shape[1] == 1:
        return torch.nn.functional.mse_loss(student.float(), teacher.float())
    student, teacher = student.float().log_softmax(1), teacher.float().log_softmax(1)
    return torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1).mean()


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of features averaged over positions, relative to the teacher's sum of squares; both (B, C, ...)."""
    student, teacher = pooled(student.float()), pooled(teacher.float())
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


class Prediction(Term):
    """`prediction_loss` of the final output."""

    def forward(self, batch: UnitBatch) -> Tensor:
        return prediction_loss(batch.tail(batch.student_out), batch.teacher_features)


class Features(Term):
    """`feature_loss` of the unit's output."""

    def forward(self, batch: UnitBatch) -> Tensor:
        return feature_loss(batch.student_out, batch.teacher_out)
