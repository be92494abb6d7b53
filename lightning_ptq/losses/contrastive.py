"""Contrastive calibration (CL-Calib, Shang et al. 2024): keep the mutual information of both activations.

Student and teacher activations of a unit go through the frozen rest of the teacher and are compared there. The same
image is a positive pair, other images of the batch are negatives. Minimising the loss raises a lower bound of
I(full-precision; quantized).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_ptq.config import check_option
from lightning_ptq.errors import PTQError
from lightning_ptq.losses.base import Term, UnitBatch

ContrastiveLoss = Literal["infonce", "nce", "dcl", "debiased"]


@dataclass(frozen=True)
class ContrastiveConfig:
    """How the contrastive term is computed.

    Args:
        loss: "infonce" (MI >= log B - loss); "nce" (binary, the reading of the third-party reimplementation); "dcl"
            (infonce whose positive is not among what it is compared with, so that its gradient stays when it is close);
            "debiased" (infonce that takes a share `prior` of the negatives for hidden positives).
        two_sided: average the loss of student against teachers and that of teacher against students.
        temperature: divides the cosine similarities.
        rho: norm of the term's gradient at the unit's output, relative to the reconstruction's.
        prior: share of hidden positives among the negatives of "debiased".
        mask_collisions: leave out negatives for which the teacher predicts the same class: they are no negatives.

    Raises:
        PTQError: an unknown loss, or a temperature or rho that is not positive.
    """

    loss: ContrastiveLoss = "infonce"
    temperature: float = 0.1
    rho: float = 0.1
    mask_collisions: bool = True
    two_sided: bool = False
    prior: float = 0.1

    def __post_init__(self) -> None:
        check_option(self.loss, get_args(ContrastiveLoss), "contrastive loss")
        for name in ("temperature", "rho"):
            if not getattr(self, name) > 0:
                raise PTQError(f"contrastive {name}={getattr(self, name)} must be positive. The default is 0.1.")
        if not 0 <= self.prior < 1:
            raise PTQError(f"contrastive prior={self.prior} is no share below 1. The default is 0.1.")


def similarities(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cosine similarity of every student feature to every teacher feature, over the temperature.

    Shapes: (B, D) and (N, D) -> (B, N).
    """
    student = torch.nn.functional.normalize(student.float(), dim=1)
    teacher = torch.nn.functional.normalize(teacher.float(), dim=1)
    return student @ teacher.T / temperature


def infonce_loss(logits: Tensor, negatives: Tensor) -> Tensor:
    """-mean_i log(exp s_ii / (exp s_ii + sum over negatives j of exp s_ij)) (van den Oord et al. 2018, eq. 4).

    Args:
        logits: (B, B) similarities over the temperature, positives on the diagonal.
        negatives: (B, B) boolean, False on the diagonal.
    """
    return (_log_sum(logits, _compared(negatives)) - logits.diagonal()).mean()


def nce_loss(logits: Tensor, negatives: Tensor) -> Tensor:
    """mean_i softplus(-s_ii) + mean over negative pairs of softplus(s_ij); shapes as in `infonce_loss`."""
    positive = torch.nn.functional.softplus(-logits.diagonal()).mean()
    negative = torch.nn.functional.softplus(logits) * negatives
    return positive + negative.sum() / negatives.sum().clamp(min=1)


def dcl_loss(logits: Tensor, negatives: Tensor) -> Tensor:
    """-mean_i log(exp s_ii / sum over negatives j of exp s_ij) (Yeh et al. 2022); shapes as in `infonce_loss`.

    A row without negatives counts its positive alone.
    """
    return (_log_sum(logits, negatives) * negatives.any(1) - logits.diagonal()).mean()


def debiased_loss(logits: Tensor, negatives: Tensor, prior: float, temperature: float) -> Tensor:
    """InfoNCE with the negatives' mean corrected for hidden positives (Chuang et al. 2020).

    -mean_i log(exp s_ii / (exp s_ii + n_i g_i)), where n_i counts the negatives of row i and g_i is their mean of
    exp s_ij, less `prior` times exp s_ii, over 1 - `prior`, and at least the smallest value that cosines can have,
    exp(-1 / temperature). Shapes as in `infonce_loss`.
    """
    top = logits.detach().masked_fill(~_compared(negatives), float("-inf")).amax(1)  # taken out of every exponential
    positive = (logits.diagonal() - top).exp()
    count = negatives.sum(1)
    mean = (logits - top[:, None]).masked_fill(~negatives, float("-inf")).exp().sum(1) / count.clamp(min=1)
    corrected = ((mean - prior * positive) / (1.0 - prior)).maximum((-1.0 / temperature - top).exp())
    return ((positive + count * corrected).log() - logits.diagonal() + top).mean()


def _compared(negatives: Tensor) -> Tensor:
    """(B, B) mask of the pairs that a row is compared with: its negatives and its positive, on the diagonal."""
    return negatives | torch.eye(len(negatives), dtype=torch.bool, device=negatives.device)


def _log_sum(logits: Tensor, chosen: Tensor) -> Tensor:
    """logsumexp of the chosen elements of each row (B,); of none, a large negative number and no gradient."""
    return logits.masked_fill(~chosen, torch.finfo(logits.dtype).min).logsumexp(1)


def collision_free(features: Tensor, mask_collisions: bool = True) -> Tensor:
    """(B, B) boolean mask of pairs that are negatives, given the teacher's features (B, D).

    The diagonal is never one; with `mask_collisions` neither is a pair for which the teacher's argmax agrees.
    """
    classes = features.argmax(1) if mask_collisions else torch.arange(len(features), device=features.device)
    return classes[:, None] != classes[None, :]


def pooled(features: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C): mean over positions."""
    return features.flatten(2).mean(2) if features.dim() > 2 else features


class Contrastive(Term):
    """The contrastive term with the frozen-tail critic."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        self.rho = config.rho

    def forward(self, batch: UnitBatch) -> Tensor:
        teacher = pooled(batch.teacher_features.float())  # (B, D)
        student = pooled(batch.tail(batch.student_out).float())  # (B, D)
        logits = similarities(student, teacher, self.config.temperature)  # (B, B)
        negatives = collision_free(teacher, self.config.mask_collisions)
        if self.config.two_sided:
            return (self._loss(logits, negatives) + self._loss(logits.T, negatives.T)) / 2
        return self._loss(logits, negatives)

    def _loss(self, logits: Tensor, negatives: Tensor) -> Tensor:
        if self.config.loss == "debiased":
            return debiased_loss(logits, negatives, self.config.prior, self.config.temperature)
        return {"infonce": infonce_loss, "nce": nce_loss, "dcl": dcl_loss}[self.config.loss](logits, negatives)
