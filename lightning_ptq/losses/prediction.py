"""What the network as a whole should keep: its predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ptq.losses.base import Term, UnitBatch

# By which PD-Quant divides logits.
TEMPERATURE = 4.0


def prediction_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats of the class distributions, mean over batch and positions (Hinton et al. 2015).

    Args:
        student, teacher: logits (B, classes, ...). One class has no distribution: then it is the squared error.
        temperature: divides the logits first.
    """
    return _divergence(student, teacher, temperature).mean()


def prediction_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """`prediction_loss` of every image by itself, (B,)."""
    return _divergence(student, teacher, 1.0).reshape(len(student), -1).mean(1)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B, ...): of every image and position."""
    if student.shape[1] == 1:
        return (student.float() - teacher.float()).square()
    student, teacher = (x.float().div(temperature).log_softmax(1) for x in (student, teacher))
    return torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


class Prediction(Term):
    """`prediction_loss` of the final output."""

    recordable = True

    def forward(self, batch: UnitBatch) -> Tensor:
        return prediction_loss(batch.tail(batch.student_out), batch.teacher_features)


class PredictionDifference(Prediction):
    """The same behind the frozen rest of the teacher, as PD-Quant adds it to a unit's reconstruction (Liu et al. 2023).

    PD-Quant softens both distributions with a temperature of 4 and weights the term by a constant; here the weight is
    balanced like that of any other term, since a constant means something else in every unit.

    Args:
        rho: norm of its gradient at the unit's output, relative to the reconstruction's.
    """

    def __init__(self, rho: float) -> None:
        super().__init__()
        self.rho = rho

    def forward(self, batch: UnitBatch) -> Tensor:
        return prediction_loss(batch.tail(self.output(batch)), batch.teacher_features, TEMPERATURE)

    def output(self, batch: UnitBatch) -> Tensor:
        """Without drop and mixed input. PD-Quant's batches hold every image twice too, the second time unmixed."""
        return batch.clean_out
