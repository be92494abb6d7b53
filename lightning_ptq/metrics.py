"""How close a student is to its teacher: agreement, signal-to-noise ratio, mutual information."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ptq.losses.critic import cosine

# What a validation measures, in percent, each a `MeanRate`.
RATES = ("teacher_top1", "nearest_top1", "student_top1", "nearest_agreement", "student_agreement")


def sqnr_db(student: Tensor, teacher: Tensor) -> float:
    """Signal to quantization-noise ratio in decibels, 10 log10(sum t^2 / sum (s - t)^2); inf where they are equal."""
    noise = float((student.double() - teacher.double()).square().sum())
    signal = float(teacher.double().square().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0 else -math.inf


def mi_lower_bound(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> float:
    """InfoNCE lower bound of the mutual information of two activations, in nats, at most log N.

    The critic is the cosine similarity over `temperature` of activations centred on the teacher's mean.

    Shapes: both (N, ...), row i of each from the same image.
    """
    mean = teacher.float().mean(0, keepdim=True)
    logits = cosine((student.float() - mean).flatten(1), (teacher.float() - mean).flatten(1), temperature)
    loss = (logits.logsumexp(1) - logits.diagonal()).mean()
    return math.log(len(logits)) - float(loss)


class MeanRate(Metric):
    """Percentage of predictions that equal a reference: labels (top-1) or the teacher's predictions (agreement)."""

    hits: Tensor
    total: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, reference: Tensor) -> None:
        """Add predicted classes and what they should be, any equal shape."""
        self.hits += (predictions == reference).sum()
        self.total += predictions.numel()

    def compute(self) -> Tensor:
        """Percent, shape ()."""
        return 100.0 * self.hits / self.total


def classes(output: Tensor) -> Tensor:
    """Predicted class of every position: (N, C, ...) -> (N, ...)."""
    return output.argmax(1)
