"""What a training step computes: the terms of a unit, or of the whole network, from what the caches hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_ptq.augment import Augmentation
from lightning_ptq.cache import Minibatch
from lightning_ptq.drop import DropMask
from lightning_ptq.evaluation import Evaluation
from lightning_ptq.functional import in_float32
from lightning_ptq.graph import Chain
from lightning_ptq.graph.taps import recorded
from lightning_ptq.losses import Tail, UnitBatch
from lightning_ptq.losses.base import Objective
from lightning_ptq.methods import Method
from lightning_ptq.seeds import mixed_seed
from lightning_ptq.selection import Selection
from lightning_ptq.session import Session


class Steps(Evaluation):
    """The part of a `PTQModule` that computes what a step minimises; it changes no parameter."""

    method: Method
    objective: Objective
    network_objective: Objective
    session: Session
    augment: Augmentation
    seed: int
    _selection: Selection
    _drop: DropMask
    _generator: torch.Generator | None = None  # of what terms draw at random

    def _terms_of(
        self, unit: int, batch: Minibatch, step: int, progress: float, beta: float | Tensor | None
    ) -> dict[str, Tensor]:
        """The objective's terms at a step of `unit`, or of the whole network."""
        if unit < len(self.student):
            return self._unit_terms(unit, batch, step, progress, beta)
        # At bfloat16 the whole network, where a rounding leads to others, learns for another one than is measured.
        with in_float32(self.device):
            return self._network_terms(batch, step, progress)

    def _unit_terms(
        self, unit: int, batch: Minibatch, step: int, progress: float, beta: float | Tensor | None
    ) -> dict[str, Tensor]:
        self._drop.rewind()  # a step that could not be recorded is computed twice
        with recorded(self.student.units[unit]) as inner:
            student_out = self.student.units[unit](self._unit_input(batch))
        terms: dict[str, Tensor] = self.objective(
            UnitBatch(
                student_out=student_out,
                teacher_out=batch.teacher_out,
                teacher_features=batch.features,
                teacher_side=self.session.opened,
                rows=batch.rows,
                tail=self._tail(self.teacher, unit + 1, self.trainer.precision_plugin.forward_context),
                student_unit=self.student.units[unit],
                roundings=[q.take_rounding() for q in self._selection.rounded],
                unit=unit,
                step=step,
                progress=self.method.rounding_progress(progress),
                beta=beta,
                channel_dim=self.student.channel_dim(unit, student_out.shape),
                importance=self.session.importance_of(unit),
                inner=list(zip(inner, self._teacher_inner(unit, batch), strict=True)) if inner else (),
                generator=self._generator,
                clean=(lambda: self._clean_out(unit, batch)) if self.method.drop and self._drop.active else None,
            )
        )
        return terms

    def _clean_out(self, unit: int, batch: Minibatch) -> Tensor:
        """The unit's output without drop and mixed input, at the Trainer's precision."""
        x = batch.teacher_in if self.method.input == "fp" else batch.student_in
        self._drop.active = False
        try:
            with self.trainer.precision_plugin.forward_context(), recorded(self.student.units[unit]):
                out: Tensor = self.student.units[unit](x)
        finally:
            self._drop.active = True
        for q in self._selection.rounded:
            q.take_rounding()  # the regulariser has read that of the first pass
        return out

    def _network_terms(self, batch: Minibatch, step: int, progress: float) -> dict[str, Tensor]:
        head = len(self.student) - 1
        if self.augment:
            batch = self._augmented(batch, step)
        student_out = self.student(batch.student_in, stop=head)
        terms: dict[str, Tensor] = self.network_objective(
            UnitBatch(
                student_out=student_out,
                channel_dim=self.student.channel_dim(head - 1, student_out.shape),
                teacher_out=batch.teacher_out,
                teacher_features=batch.features,
                teacher_side=self.session.opened,
                rows=batch.rows,
                tail=self._tail(self.student, head, nullcontext),
                student_unit=self.student,
                unit=0,
                step=step,
                progress=progress,
                changed=bool(self.augment),
                generator=self._generator,
            )
        )
        return terms

    @torch.no_grad()
    def _augmented(self, batch: Minibatch, step: int) -> Minibatch:
        """The batch with changed images, and what the teacher makes of these."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, step, self.global_rank))
        images = self.teacher.laid_out(self.augment(batch.student_in, generator), self.device)
        head_in = self.teacher(images, stop=len(self.teacher) - 1)
        out = self.teacher(head_in, start=len(self.teacher) - 1)
        return Minibatch(images, images, head_in, out, batch.rows)

    def _unit_input(self, batch: Minibatch) -> Tensor:
        if self.method.input == "fp":
            return batch.teacher_in
        return self._drop.mix(batch.student_in, batch.teacher_in) if self.method.input == "mix" else batch.student_in

    def _teacher_inner(self, unit: int, batch: Minibatch) -> list[Tensor]:
        """What the teacher's unit computes where layers end inside it."""
        with torch.no_grad(), recorded(self.teacher.units[unit]) as inner:
            self.teacher.units[unit](batch.teacher_in)
        return inner

    def _tail(self, chain: Chain, start: int, precision: Callable[[], AbstractContextManager[Any]]) -> Tail:
        """The units of `chain` from `start` on, at a precision of their own: terms are computed in float32."""

        def run(x: Tensor, units: int) -> Tensor:
            with precision():
                return chain(x, start=start, stop=start + units)  # type: ignore[no-any-return]

        return Tail(run, len(chain) - start, lambda units, shape: chain.channel_dim(start + units - 1, shape))
