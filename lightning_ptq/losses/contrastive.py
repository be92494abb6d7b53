"""Contrastive calibration (CL-Calib, Shang et al. 2024): keep the mutual information of both activations.

Features of the student's and the teacher's activation of a unit are compared (`critic.py`): the same image is a
positive pair, other images are negatives (`infonce.py`). Minimising the loss raises a lower bound of
I(full-precision; quantized).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_ptq.config import check_option
from lightning_ptq.errors import PTQError
from lightning_ptq.functional import binade
from lightning_ptq.losses.base import Tail, Term, UnitBatch, channels_first
from lightning_ptq.losses.critic import (
    Collisions,
    FeatureMap,
    Similarity,
    at_positions,
    cosine,
    find_negatives,
    gaussian,
    pooled,
    projected,
)
from lightning_ptq.losses.gather import first_row, gather_rows, rank, rows_of_all
from lightning_ptq.losses.infonce import dcl_loss, debiased_loss, infonce_loss, nce_loss
from lightning_ptq.store import chunks, widened

ContrastiveLoss = Literal["infonce", "nce", "dcl", "debiased"]
NegativeSource = Literal["batch", "bank"]


@dataclass(frozen=True)
class ContrastiveConfig:
    """How the contrastive term is computed.

    Args:
        loss: what is minimised. "infonce" (MI >= log N - loss); "nce" (binary, the reading of the third-party
            reimplementation); "dcl" (infonce whose positive is not among what it is compared with, so that its gradient
            stays when it is close); "debiased" (infonce that takes a share `prior` of the negatives for hidden
            positives).
        feature: what is compared: "tail" (the paper: what the frozen rest of the teacher makes of the activation),
            "tail-features" (the same up to the last unit's input), "output" (the activation itself), all three averaged
            over positions, "projection" (a fixed random projection of it) or "positions" (the activation at one
            position is compared with that at others, of the same and of other images of the batch).
        tail_units: run only so many units of the tail; None runs all that `feature` asks for.
        center: take the teacher's mean feature off both.
        similarity: "cosine", or "gaussian": the negative squared distance.
        negatives: the other images of the "batch", or of the whole "bank" of calibration images.
        collisions: what to do about images that are no negatives: leave out those for which the teacher predicts the
            same class ("argmax") or the share `prior` with the most similar features, by the cosine to the teacher's
            mean ("similarity"), or "keep" them.
        two_sided: average the loss of student against teachers and that of teacher against the batch's students.
        temperature: divides the similarities.
        rho: norm of the term's gradient at the unit's output, relative to the reconstruction's.
        prior: share of hidden positives among the negatives, for "debiased" and "similarity".
        every: compute the term at every so many steps only, with so many times its weight.
        images: compute the student's features of the first so many images of a batch; None takes all.
        positions: with "positions", draw so many of the batch's at each step.

    Raises:
        PTQError: an unknown choice, or a number outside its range.
    """

    loss: ContrastiveLoss = "dcl"
    feature: FeatureMap = "positions"
    tail_units: int | None = None
    center: bool = False
    similarity: Similarity = "cosine"
    negatives: NegativeSource = "batch"
    collisions: Collisions = "argmax"
    two_sided: bool = False
    temperature: float = 0.1
    rho: float = 1.0
    prior: float = 0.1
    every: int = 1
    images: int | None = None
    positions: int = 512

    def __post_init__(self) -> None:
        check_option(self.loss, get_args(ContrastiveLoss), "contrastive loss")
        check_option(self.feature, get_args(FeatureMap), "contrastive feature")
        check_option(self.similarity, get_args(Similarity), "contrastive similarity")
        check_option(self.negatives, get_args(NegativeSource), "contrastive negatives")
        check_option(self.collisions, get_args(Collisions), "contrastive collisions")
        for name in ("temperature", "rho"):
            if not getattr(self, name) > 0:
                default = getattr(ContrastiveConfig, name)
                raise PTQError(f"contrastive {name}={getattr(self, name)} must be positive. The default is {default}.")
        if not 0 <= self.prior < 1:
            raise PTQError(f"contrastive prior={self.prior} is no share below 1. The default is 0.1.")
        if self.feature == "positions" and self.negatives == "bank":
            raise PTQError(
                "contrastive negatives='bank' holds whole images and feature='positions' compares parts of them. "
                "Use negatives='batch', or another feature."
            )
        if self.tail_units is not None and not self.feature.startswith("tail"):
            raise PTQError(
                f"contrastive tail_units={self.tail_units} needs feature='tail' or 'tail-features', not "
                f"{self.feature!r}. Leave it out, or change that."
            )
        for name, least in (("every", 1), ("images", 1), ("tail_units", 0), ("positions", 2)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise PTQError(
                    f"contrastive {name}={value} must be a whole number, {least} or more. Leave it out for the default."
                )


@dataclass(frozen=True)
class _Teacher:
    """The teacher's side of a comparison: its N columns.

    The bank of a unit holds all calibration images of all processes: exact, since the teacher is frozen.

    Attributes:
        features: (N, D). outputs: (N, classes), averaged over positions.
        mean: (D,) what is taken off all features. deviation: root mean square distance of the features to their mean.
        offset: column of this process's first image.
    """

    features: Tensor
    outputs: Tensor
    mean: Tensor
    deviation: Tensor
    offset: int


def _place(rows: Tensor) -> Tensor:
    """Where this process's `rows` (b,) come among those of all processes."""
    return rank() * len(rows) + torch.arange(len(rows), device=rows.device)


class Contrastive(Term):
    """The contrastive term."""

    recordable = True

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        self.rho, self.every = config.rho, config.every
        self._bank: _Teacher | None = None
        self._bank_is_of: weakref.ref[Tensor] | None = None

    def forward(self, batch: UnitBatch) -> Tensor:
        """The chosen loss of the batch, a scalar."""
        student, side, place = self._positions(batch) if self.config.feature == "positions" else self._images(batch)
        negatives = find_negatives(place, side.features, side.outputs, self.config.collisions, self.config.prior)
        loss = self._loss(self._similarity(student, side.features, side), place, negatives)
        if not self.config.two_sided:
            return loss
        # The other way round: the teacher's rows of this process against the students of all.
        back = self._similarity(rows_of_all(student), side.features[place], side).T  # (b, b of all)
        return (loss + self._loss(back, _place(place), negatives[:, rows_of_all(place)])) / 2

    def _images(self, batch: UnitBatch) -> tuple[Tensor, _Teacher, Tensor]:
        """One row for each of the batch's first images: (b, D), the teacher's side, and each row's own column of it."""
        bank, first = self._bank_of(batch), slice(self.config.images)
        own = bank.offset + batch.rows  # (B,) rows of the bank
        if self.config.negatives == "bank":
            side, place = bank, own
        else:  # the batches of all processes
            columns, place = rows_of_all(own), _place(own)
            side = replace(bank, features=bank.features[columns], outputs=bank.outputs[columns])
        if batch.changed:
            outputs = pooled(batch.teacher_features.float())
            features = self._teacher_features(batch.teacher_out, outputs, batch) - bank.mean
            if self.config.negatives == "bank":
                features = side.features.index_copy(0, place, features)
                outputs = side.outputs.index_copy(0, place, outputs)
            else:
                features, outputs = rows_of_all(features), rows_of_all(outputs)
            side = replace(side, features=features, outputs=outputs)
        student = self._features(batch.student_out[first], batch).float() - bank.mean
        return student, side, place[first]

    def _positions(self, batch: UnitBatch) -> tuple[Tensor, _Teacher, Tensor]:
        """The same with one row for each of so many positions, drawn anew at each step among those of all images."""
        first = slice(self.config.images)
        outputs = (channels_first(x[first], batch.channel_dim) for x in (batch.student_out, batch.teacher_out))
        student, teacher = (at_positions(x) for x in outputs)
        drawn = torch.randperm(len(student), generator=batch.generator, device=student.device)
        drawn = drawn[: self.config.positions]
        image = drawn // (len(student) // len(batch.student_out[first]))
        features = rows_of_all(teacher[drawn].float())
        side = self._side(features, rows_of_all(pooled(batch.teacher_features.float())[image]))
        return student[drawn].float() - side.mean, side, _place(drawn)

    def _side(self, features: Tensor, outputs: Tensor, offset: int = 0) -> _Teacher:
        """The teacher's side of features (N, D), with their mean taken off if asked for, and outputs (N, classes)."""
        mean = features.mean(0)
        centred = features - mean
        unit = binade(centred.abs().max())
        deviation = (centred / unit).square().sum(1).mean().sqrt() * unit
        mean = mean if self.config.center else torch.zeros_like(mean)
        return _Teacher(features - mean, outputs, mean, deviation, offset)

    def forget(self) -> None:
        """Drop the teacher's side."""
        self._bank = self._bank_is_of = None

    def _similarity(self, student: Tensor, teacher: Tensor, side: _Teacher) -> Tensor:
        if self.config.similarity == "gaussian":
            return gaussian(student, teacher, self.config.temperature, side.deviation)
        return cosine(student, teacher, self.config.temperature)

    def _loss(self, logits: Tensor, own: Tensor, negatives: Tensor) -> Tensor:
        positive = logits.gather(1, own[:, None])[:, 0]
        if self.config.loss == "debiased":
            lowest = -1.0 / self.config.temperature if self.config.similarity == "cosine" else float("-inf")
            return debiased_loss(positive, logits, negatives, self.config.prior, lowest)
        return {"infonce": infonce_loss, "nce": nce_loss, "dcl": dcl_loss}[self.config.loss](
            positive, logits, negatives
        )

    def _features(self, x: Tensor, batch: UnitBatch) -> Tensor:
        """What is compared, of a unit's output (B, ...): (B, D)."""
        units = self._tail_units(batch.tail) if self.config.feature.startswith("tail") else 0
        behind = batch.tail(x, units)
        dim = batch.tail.channel_dim(units, behind.shape) if units else batch.channel_dim
        behind = channels_first(behind, dim)
        return projected(behind.float()) if self.config.feature == "projection" else pooled(behind)

    @torch.no_grad()
    def _teacher_features(self, teacher_out: Tensor, outputs: Tensor, batch: UnitBatch) -> Tensor:
        """What is compared, of the teacher's output of a unit (n, ...) and its final ones (n, classes): (n, D).

        Behind the whole tail these are the final outputs, also where the tail is the student's.
        """
        if self.config.feature.startswith("tail") and self._tail_units(batch.tail) == batch.tail.length:
            return outputs
        parts = [self._features(widened(x.to(outputs.device)), batch) for x in chunks(teacher_out)]
        return torch.cat(parts).float()

    def _tail_units(self, tail: Tail) -> int:
        wanted = tail.length - (self.config.feature == "tail-features")
        return max(0, wanted if self.config.tail_units is None else min(wanted, self.config.tail_units))

    @torch.no_grad()
    def _bank_of(self, batch: UnitBatch) -> _Teacher:
        """The teacher's side, computed once for each unit."""
        side = batch.teacher_side
        if self._bank is None or self._bank_is_of is None or self._bank_is_of() is not side.teacher_out:
            device = batch.student_out.device
            outputs = torch.cat([pooled(x.to(device).float()) for x in chunks(side.features)])
            features = self._teacher_features(side.teacher_out, outputs, batch)
            self._bank = self._side(gather_rows(features), gather_rows(outputs), first_row(len(features)))
            self._bank_is_of = weakref.ref(side.teacher_out)
        return self._bank
