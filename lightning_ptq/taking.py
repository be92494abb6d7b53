"""How steps are taken: one to a batch of Lightning's or several, computed as usual or played back, and told of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.cache import Minibatch
from lightning_ptq.checks import check_steps_per_batch, counts_batches, leaves_gradients_alone
from lightning_ptq.cpu_replay import CpuReplay, can_be_taped
from lightning_ptq.functional import in_float32
from lightning_ptq.gpu_replay import GpuReplay
from lightning_ptq.kernels import kernels_for
from lightning_ptq.loader import Minibatches
from lightning_ptq.losses.base import Objective
from lightning_ptq.losses.rounding import annealed_beta
from lightning_ptq.methods import cosine
from lightning_ptq.optimizer import Adam
from lightning_ptq.overhead import QuickName
from lightning_ptq.record import note
from lightning_ptq.replay import Numbers, Replay, clear_gradients
from lightning_ptq.seeds import mixed_seed
from lightning_ptq.steps import Steps

# Points of a unit's curves in the report, at least, where it has as many steps.
_POINTS = 20
# Optimisation steps of a batch, at most: Lightning's loop takes as long as a recorded step on a GPU, and a tenth of one
# on a CPU.
_STEPS_PER_BATCH = {"cuda": 20, "cpu": 5}
# Steps of an epoch on a CPU from which on recording them saves more than the few that are recorded and proven cost.
WORTH_A_TAPE = 60


class Taking(QuickName, Steps):
    """The part of a `PTQModule` that Lightning calls at every step.

    Attributes:
        epoch_names: the units', and that of the whole network's epoch if there is one.
        anchor: gives Lightning and DDP a gradient where nothing is learned.
    """

    record_steps: bool
    steps_per_unit: int
    network_steps: int
    steps_per_batch: int
    epoch_names: tuple[str, ...]
    anchor: nn.Parameter
    rounding_lr: float
    scale_lr: float
    network_lr: float
    network_rounding_lr: float
    _asked_per_batch: int | None
    _replay: Replay[Any]
    _numbers: Numbers
    _records = False  # whether steps of the epoch in progress are recorded

    def steps_of(self, unit: int) -> int:
        """Optimisation steps of `unit`, or of the whole network if that is len(student)."""
        return self.network_steps if unit == len(self.student) else self.steps_per_unit

    def batches_of(self, unit: int) -> int:
        """Lightning's batches of an epoch."""
        return -(-self.steps_of(unit) // self.steps_per_batch)

    def steps_taken(self) -> int:
        """Steps of the epoch in progress, as the Trainer limits it."""
        batches = int(self.trainer.num_training_batches)
        return min(self.steps_of(self.trainer.current_epoch), batches * self.steps_per_batch)

    def set_steps_per_batch(self) -> None:
        """Take as many steps to a batch as were asked for, or as suit the Trainer.

        Raises:
            PTQError: the Trainer can't take several.
        """
        if self._asked_per_batch is None:
            several = self._can_record(self.objective) and not counts_batches(self.trainer)
            most = _STEPS_PER_BATCH.get(self.trainer.strategy.root_device.type, 1) if several else 1
            self.steps_per_batch = max(1, min(self.steps_per_unit // 100, most))
        check_steps_per_batch(self.trainer, self.steps_per_batch)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Clear the gradients of what is trained: nothing else has any, and walking all of it takes time."""
        if not self._optimizer.differentiated:
            clear_gradients(self._trained)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward pass, unless the step was played back, this pass with it."""
        if not self._optimizer.differentiated:
            super().backward(loss, *args, **kwargs)

    def training_step(self, batch: Minibatch | Minibatches, batch_idx: int) -> Tensor:
        """The next steps of the current unit, or of the whole network; the loss of the last, which Lightning takes."""
        if isinstance(batch, Minibatch):
            return self._step(batch, batch_idx)
        for step, minibatch in zip(batch.steps, batch, strict=True):
            loss = self._step(minibatch, step)
            if step != batch.steps[-1]:
                if not self._optimizer.differentiated:
                    self.optimizer_zero_grad(self.trainer.current_epoch, batch_idx, self._optimizer)
                    with in_float32(self.device):
                        loss.backward()
                self._optimizer.step()
                del loss  # a step is recorded while nothing of an earlier one is left
        return loss

    def _step(self, batch: Minibatch, step: int) -> Tensor:
        """One step: the sum of the objective's terms."""
        unit, optimizer = self.trainer.current_epoch, self._optimizer
        optimizer.differentiated = optimizer.stepped = False
        torch.clear_autocast_cache()  # it holds parameters as they were before the last step of the same batch
        progress = self.session.progress(step, self.steps_taken())
        if progress >= 1.0:
            return self._nothing()
        objective = self.network_objective if unit == len(self.student) else self.objective
        beta = self._prepare(unit, step, progress)

        def compute() -> tuple[dict[str, Tensor], Tensor]:
            terms = self._terms_of(unit, batch, step, progress, beta)
            return terms, sum(terms.values(), 0.0 * self.anchor)

        if self._records and objective.is_steady(step):
            form = unit, self._drop.active, beta is None, objective.present(step)
            assert self._generator is not None
            terms, loss = self._replay.take(form, compute, optimizer, self._trained, self._generator)
        else:
            terms, loss = compute()
        self._tell(self.epoch_names[unit], step + 1, terms)
        return loss

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
        self._drop.active = progress < self.method.drop_until
        self._drop.seed(mixed_seed(self.seed, self.global_rank), seed)
        beta = annealed_beta(self.method.rounding_progress(progress))
        there = self._records or self.device.type == "cuda"
        return self._numbers.put("beta", beta, self.device) if there and beta is not None else beta

    def begin_recording(self, unit: int) -> None:
        """Decide whether steps of `unit` are recorded. What Python draws is in no recording."""
        network = unit == len(self.student)
        objective = self.network_objective if network else self.objective
        if self.anchor.is_cuda:
            there, self._replay = kernels_for(self.anchor) is not None, GpuReplay()
        else:
            worth_it = self.anchor.is_cpu and self.steps_of(unit) >= WORTH_A_TAPE
            there = worth_it and can_be_taped(self.student) and can_be_taped(self.teacher)
            self._replay = CpuReplay()
        there &= not torch.is_anomaly_enabled() and not (network and self.augment)
        self._records = there and self._can_record(objective)

    def _can_record(self, objective: Objective) -> bool:
        """Whether nothing but the device forbids it."""
        return self.record_steps and objective.is_recordable and leaves_gradients_alone(self.trainer)

    @property
    def reuses_memory(self) -> bool:
        """Whether each minibatch has to lie where the last one did, for a recording to find it."""
        return self._records or self.device.type == "cuda"

    def forget_recordings(self) -> None:
        """Give back what recordings hold, the gradients of what is trained among it."""
        self._replay.forget()
        clear_gradients(self._trained)

    @property
    def _trained(self) -> tuple[nn.Parameter, ...]:
        """What gets gradients."""
        return *self._selection.trained, self.anchor

    @property
    def _optimizer(self) -> Adam:
        optimizer = self.trainer.optimizers[0]
        assert isinstance(optimizer, Adam)
        return optimizer

    def _nothing(self) -> Tensor:
        """The loss of a step that is to change nothing: DDP insists on a gradient of all that it watches."""
        self._set_rates()
        return sum((0.0 * parameter.sum() for parameter in self._selection.trained), 0.0 * self.anchor)

    def _set_rates(self, **rates: float) -> None:
        """Learning rates of the named groups, 0 for others; anew at each step, so resuming needs no scheduler."""
        for group in self._optimizer.param_groups:
            rate = rates.get(group["name"], 0.0)
            # A recording for a GPU holds the optimizer's step too.
            there = self.device.type == "cuda"
            group["lr"] = self._numbers.put(group["name"], rate, self.device) if there else rate

    def _tell(self, name: str, step: int, terms: dict[str, Tensor]) -> None:
        """Terms to bar and loggers every `log_every_n_steps` optimisation steps, or for every batch if it has more.

        To the report as often, or `_POINTS` times a unit.
        """
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        interval = interval and max(interval, self.steps_per_batch)
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
