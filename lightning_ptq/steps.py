"""What a training step computes: the terms of a unit, or of the whole network, from what the caches hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.augment import Augmentation
from lightning_ptq.cache import Minibatch
from lightning_ptq.checks import takes_plain_steps
from lightning_ptq.drop import DropMask
from lightning_ptq.evaluation import Evaluation
from lightning_ptq.functional import in_float32, kernels_for
from lightning_ptq.graph import Chain
from lightning_ptq.graph.taps import recorded
from lightning_ptq.loader import Minibatches
from lightning_ptq.losses import Tail, UnitBatch
from lightning_ptq.losses.base import Objective
from lightning_ptq.losses.rounding import annealed_beta
from lightning_ptq.methods import Method, cosine
from lightning_ptq.optimizer import Adam
from lightning_ptq.overhead import QuickName
from lightning_ptq.record import note
from lightning_ptq.replay import Numbers, Replay
from lightning_ptq.seeds import mixed_seed
from lightning_ptq.selection import Selection
from lightning_ptq.session import Session

# Points of a unit's curves in the report, at least, where it has as many steps.
_POINTS = 20


class Steps(QuickName, Evaluation):
    """The part of a `PTQModule` that Lightning calls at every step; it changes no parameter.

    Attributes:
        epoch_names: the units', and that of the whole network's epoch if there is one.
        anchor: gives Lightning and DDP a gradient where nothing is learned.
    """

    method: Method
    objective: Objective
    network_objective: Objective
    session: Session
    augment: Augmentation
    cuda_graphs: bool
    steps_per_batch: int
    epoch_names: tuple[str, ...]
    anchor: nn.Parameter
    rounding_lr: float
    scale_lr: float
    network_lr: float
    network_rounding_lr: float
    seed: int
    _selection: Selection
    _drop: DropMask
    _replay: Replay
    _numbers: Numbers
    _generator: torch.Generator | None = None  # of what terms draw at random
    _records = False  # whether steps of the epoch in progress are recorded as CUDA graphs

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Clear the gradients of what is trained: nothing else has any, and walking all of it takes time."""
        if not self._optimizer.stepped:
            for parameter in (*self._selection.trained, self.anchor):
                parameter.grad = None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward pass, unless the step was played back, this pass with it."""
        if not self._optimizer.stepped:
            super().backward(loss, *args, **kwargs)

    def training_step(self, batch: Minibatch | Minibatches, batch_idx: int) -> Tensor:
        """The next steps of the current unit, or of the whole network; the loss of the last, which Lightning takes."""
        if isinstance(batch, Minibatch):
            return self._step(batch, batch_idx)
        for step, minibatch in zip(batch.steps, batch, strict=True):
            loss = self._step(minibatch, step)
            if step != batch.steps[-1] and not self._optimizer.stepped:
                self.optimizer_zero_grad(self.trainer.current_epoch, batch_idx, self._optimizer)
                with in_float32(self.device):
                    loss.backward()
                self._optimizer.step()
                del loss  # a step is recorded while nothing of an earlier one is left
        return loss

    def steps_taken(self) -> int:
        """Steps of the epoch in progress, as the Trainer limits it."""
        batches = int(self.trainer.num_training_batches)
        return min(self.steps_of(self.trainer.current_epoch), batches * self.steps_per_batch)

    def _step(self, batch: Minibatch, step: int) -> Tensor:
        """One step: the sum of the objective's terms."""
        unit, optimizer = self.trainer.current_epoch, self._optimizer
        optimizer.stepped = False
        torch.clear_autocast_cache()  # it holds parameters as they were before the last step of the same batch
        progress = self.session.progress(step, self.steps_taken())
        if progress >= 1.0:
            return self._nothing()
        network = unit == len(self.student)
        objective = self.network_objective if network else self.objective
        beta = self._prepare(unit, step, progress)

        def compute() -> tuple[dict[str, Tensor], Tensor]:
            if network:
                # At bfloat16 the whole network, where a rounding leads to others, learns for another one than is
                # measured.
                with in_float32(self.device):
                    terms = self._network_terms(batch, step, progress)
            else:
                terms = self._unit_terms(unit, batch, step, progress, beta)
            return terms, sum(terms.values(), 0.0 * self.anchor)

        if self._records and objective.is_steady(step):
            form = unit, self._drop.active, beta is None, objective.present(step)
            assert self._generator is not None
            trained = *self._selection.trained, self.anchor
            terms, loss = self._replay.take(form, compute, optimizer, trained, self._generator)
        else:
            terms, loss = compute()
        self._tell(self.epoch_names[unit], step + 1, terms)
        return loss

    def steps_of(self, unit: int) -> int:
        """Optimisation steps of an epoch."""
        raise NotImplementedError

    def _prepare(self, unit: int, step: int, progress: float) -> float | Tensor | None:
        """Set all that changes from step to step but the minibatch; the exponent of AdaRound's regulariser."""
        seed = mixed_seed(self.seed, unit, step, self.global_rank)
        if self._generator is None or self._generator.device != self.device:
            self._generator = torch.Generator(self.device)
        self._generator.manual_seed(seed)
        if unit == len(self.student):
            fall = cosine(progress)
            rate = fall * self.network_lr
            self._set_rates(rounding=fall * self.network_rounding_lr, scales=rate, corrections=rate)
            return None
        rounding, scales = self.method.rate_factors(progress)
        scale_lr = scales * self.scale_lr
        self._set_rates(rounding=rounding * self.rounding_lr, scales=scale_lr, corrections=scale_lr)
        self._drop.seed(mixed_seed(self.seed, self.global_rank), seed)
        self._drop.active = progress < self.method.drop_until
        beta = annealed_beta(self.method.rounding_progress(progress))
        return None if beta is None else self._numbers.put("beta", beta, self.device)

    def begin_recording(self, unit: int) -> None:
        """Forget the recordings of another unit; decide whether steps of `unit` are recorded.

        What Python draws is in no recording.
        """
        self._replay.forget()
        network = unit == len(self.student)
        objective = self.network_objective if network else self.objective
        self._records = (
            self.cuda_graphs
            and kernels_for(self.anchor) is not None
            and takes_plain_steps(self.trainer)
            and not torch.is_anomaly_enabled()
            and objective.is_recordable
            and not (network and self.augment)
        )

    @property
    def _optimizer(self) -> Adam:
        optimizer = self.trainer.optimizers[0]
        assert isinstance(optimizer, Adam)
        return optimizer

    def _unit_terms(
        self, unit: int, batch: Minibatch, step: int, progress: float, beta: float | Tensor | None
    ) -> dict[str, Tensor]:
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

    def _nothing(self) -> Tensor:
        """The loss of a step that is to change nothing: DDP insists on a gradient of all that it watches."""
        self._set_rates()
        return sum((0.0 * parameter.sum() for parameter in self._selection.trained), 0.0 * self.anchor)

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

    def _set_rates(self, **rates: float) -> None:
        """Learning rates of the named groups, 0 for others; anew at each step, so resuming needs no scheduler."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._numbers.put(group["name"], rates.get(group["name"], 0.0), self.device)

    def _tell(self, name: str, step: int, terms: dict[str, Tensor]) -> None:
        """Terms to bar and loggers every `log_every_n_steps`; to the report as often, or `_POINTS` times a unit."""
        interval: int = self.trainer.log_every_n_steps * self.steps_per_batch  # type: ignore[attr-defined]
        steps = self.steps_taken()
        logged = interval > 0 and (step % interval == 0 or step == steps)
        noted = step % max(1, min(interval or steps, steps // _POINTS)) == 0 or step == steps
        values = {term: float(value.detach()) for term, value in terms.items()} if logged or noted else {}
        if noted:
            note(self.session.curves, name, step, values)
        if logged:
            # Copies: a recorded step writes the next terms to the same place.
            self.log_dict({term: value.detach().clone() for term, value in terms.items()}, prog_bar=True, logger=False)
            self._log(name, values)

    def _log(self, name: str, numbers: dict[str, float]) -> None:
        """To the loggers at once: `self.log` would wait for a step that `log_every_n_steps` divides."""
        for logger in self.loggers:
            logger.log_metrics({f"units/{name}/{key}": value for key, value in numbers.items()}, step=self.global_step)
