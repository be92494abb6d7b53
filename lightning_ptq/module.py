"""`PTQModule`: calibration as one `Trainer.fit`, one epoch for each reconstruction unit. Orchestration only."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_ptq.allocator import keep_freed_memory
from lightning_ptq.cache import Minibatch, mixed_seed
from lightning_ptq.calibration import UnitReport
from lightning_ptq.callbacks import RATES, model_callbacks
from lightning_ptq.checks import check_device, check_settings, check_trainer
from lightning_ptq.config import Granularity, QuantConfig
from lightning_ptq.errors import PTQError
from lightning_ptq.fingerprint import check_same, model_digest
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.taps import recorded
from lightning_ptq.loader import UnitLoader
from lightning_ptq.losses import (
    Contrastive,
    ContrastiveConfig,
    Objective,
    Reconstruction,
    RoundingRegularizer,
    Term,
    UnitBatch,
)
from lightning_ptq.methods import MethodName, Rounding, ScaleLearning, UnitInput, Weighting, default_rates, get_method
from lightning_ptq.metrics import MeanRate, classes
from lightning_ptq.quantizers import DropMask, act_quantizers, forget_ranges, initial_ranges, weight_quantizers
from lightning_ptq.session import CachePolicy, Session, World


class PTQModule(L.LightningModule):
    """Frozen full-precision teacher and quantized student; training optimises quantization parameters only.

    Args:
        model: the trained network, in eval mode; one image tensor (N, C, H, W) in, one tensor out. It is not changed.
        quant: what to quantize to how many bits.
        method: preset "nearest", "adaround", "brecq" or "qdrop" (see `methods.py`).
        contrastive: add the contrastive term of CL-Calib to the method's loss.
        critic: how that term is computed.
        steps_per_unit: optimisation steps for each unit.
        batch_size: calibration images for each step, on each process.
        rounding_lr: learning rate of the weights' rounding; None follows `steps_per_unit`.
        scale_lr: learning rate of the logarithm of activation scales; None follows `steps_per_unit`.
        rounding_weight: weight of AdaRound's regulariser.
        granularity, input, rounding, scales, drop, weighting: coordinates of the method that differ from the preset.
        leaf_modules: name patterns of modules that are not traced and stay in floating point.
        terms: further loss terms by name.
        cache: where activations are kept: on the "device", on the "host", or "auto": on the device if they fit.
        seed: seed of every random draw; None takes that of `lightning.seed_everything`, or else 0.

    Raises:
        PTQError: a model that can't be traced or quantized, or a setting outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        quant: QuantConfig = QuantConfig(),  # noqa: B008 (frozen)
        method: MethodName = "qdrop",
        *,
        contrastive: bool = False,
        critic: ContrastiveConfig = ContrastiveConfig(),  # noqa: B008 (frozen)
        steps_per_unit: int = 2000,
        batch_size: int = 32,
        rounding_lr: float | None = None,
        scale_lr: float | None = None,
        rounding_weight: float = 0.01,
        granularity: Granularity | None = None,
        input: UnitInput | None = None,
        rounding: Rounding | None = None,
        scales: ScaleLearning | None = None,
        drop: float | None = None,
        weighting: Weighting | None = None,
        leaf_modules: Sequence[str] = (),
        terms: dict[str, Term] | None = None,
        cache: CachePolicy = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_settings(
            steps_per_unit=steps_per_unit,
            batch_size=batch_size,
            rounding_lr=rounding_lr,
            scale_lr=scale_lr,
            rounding_weight=rounding_weight,
        )
        self.method_name, self.quant, self.contrastive, self.critic = method, quant, contrastive, critic
        self.model_name, self.rounding_weight = type(model).__name__, rounding_weight
        self.method = get_method(
            method,
            granularity=granularity,
            input=input,
            rounding=rounding,
            scales=scales,
            drop=drop,
            weighting=weighting,
        )
        # What learns nothing needs no steps; one keeps Lightning's loop, and so validation and checkpoints, alive.
        self.steps_per_unit = steps_per_unit if self.method.learns else 1
        self.batch_size, self.cache_policy = batch_size, cache
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        default_rounding_lr, default_scale_lr = default_rates(self.steps_per_unit)
        self.rounding_lr = default_rounding_lr if rounding_lr is None else rounding_lr
        self.scale_lr = default_scale_lr if scale_lr is None else scale_lr

        self.chains = build_chain(
            model, quant, self.method.granularity, rounding=self.method.rounding, leaf_modules=leaf_modules
        )
        self.teacher, self.student = self.chains.teacher, self.chains.student
        objective: dict[str, Term] = {"reconstruction": Reconstruction()}
        if self.method.rounding == "adaround":
            objective["rounding"] = RoundingRegularizer(rounding_weight)
        if contrastive and self.method.learns:
            objective["contrastive"] = Contrastive(critic)
        self.objective = Objective(objective | (terms or {}), len(self.student))
        # Lightning and DDP insist on a gradient; a unit that has nothing to learn gives them this one.
        self.anchor = nn.Parameter(torch.zeros(()))
        self.rates = nn.ModuleDict({name: MeanRate() for name in RATES})

        self.session = Session(self.teacher, self.student)
        self._model_digest = model_digest(self.teacher)
        self._drop = DropMask(self.method.drop)
        # Equal on all ranks by construction, and DDP wraps anew for every unit.
        self._ddp_params_and_buffers_to_ignore = [f"teacher.{name}" for name in self.teacher.state_dict()]
        self._select(None)

    # ---- Lightning's hooks, in the order in which a fit calls them ----

    def configure_callbacks(self) -> list[L.Callback]:
        """Progress by unit, a checkpoint for every unit, and the run's summary."""
        return model_callbacks(self.trainer, self)

    def setup(self, stage: str) -> None:
        """Refuse what can't work and fit the Trainer to the chain before anything long starts."""
        if stage != "fit":
            return
        check_trainer(self.trainer)
        check_device(self.trainer.strategy.root_device)
        # Both networks are frozen in eval mode on purpose.
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode", PossibleUserWarning)
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        # What DDP sees when it wraps for the first time, before the first unit is entered.
        self._select(0)
        loop, units = self.trainer.fit_loop, len(self.student)
        loop.max_epochs = units if loop.max_epochs is None or loop.max_epochs < 0 else min(units, loop.max_epochs)
        if self.trainer.datamodule.val_dataloader() == []:  # type: ignore[attr-defined]
            self.trainer.limit_val_batches = 0
        if self.trainer.check_val_every_n_epoch == 1:
            # Lightning's default would validate after every unit; what counts is the finished network.
            self.trainer.check_val_every_n_epoch = max(loop.max_epochs, 1)

    def on_fit_start(self) -> None:
        """Start anew, also on a module that was fitted before, unless a checkpoint is continued.

        Not earlier: a fit that is refused must leave the module as it was.
        """
        if not self.trainer.ckpt_path:
            self.session = Session(self.teacher, self.student)
            forget_ranges(self.student)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam over all quantization parameters; those of other units have no gradients and are skipped."""
        alphas = [q.alpha for q in weight_quantizers(self.student) if q.alpha is not None]
        scales = [q.log_scale for q in act_quantizers(self.student)]
        groups = [{"params": alphas, "name": "rounding"}, {"params": scales, "name": "scales"}]
        return torch.optim.Adam([group for group in groups if group["params"]], lr=0.0, fused=True)

    def train(self, mode: bool = True) -> PTQModule:
        """Both networks stay in eval mode: live dropout or batch statistics would be calibrated into the result."""
        super().train(mode)
        self.teacher.eval()
        self.student.eval()
        return self

    def unit_loader(self) -> UnitLoader:
        """The loader of calibration steps, which a datamodule returns as its train loader."""
        return UnitLoader(self)

    def training_step(self, batch: Minibatch, batch_idx: int) -> Tensor:
        """One step of the current unit: the sum of the objective's terms."""
        unit, name = self.trainer.current_epoch, self.student.names[self.trainer.current_epoch]
        progress = batch_idx / self.trainer.num_training_batches
        self._set_rates(progress)
        self._drop.seed(mixed_seed(self.seed, unit, batch_idx, self.global_rank), batch.student_in.device)
        with recorded(self.student.units[unit]) as inner:
            student_out = self.student.units[unit](self._unit_input(batch))
        terms: dict[str, Tensor] = self.objective(
            UnitBatch(
                student_out=student_out,
                teacher_out=batch.teacher_out,
                teacher_features=batch.features,
                tail=self._tail,
                student_unit=self.student.units[unit],
                unit=unit,
                step=batch_idx,
                progress=self.method.rounding_progress(progress),
                importance=self.session.importance_of(unit),
                inner=list(zip(inner, self._teacher_inner(unit, batch), strict=True)) if inner else (),
            )
        )
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and (batch_idx + 1) % interval == 0:
            self.log_dict(terms, prog_bar=True, logger=False)
            self.log_dict({f"units/{name}/{term}": value for term, value in terms.items()})
        return torch.stack(list(terms.values())).sum() + 0.0 * self.anchor

    def on_validation_start(self) -> None:
        """Inside `fit`, judge a unit whose steps are done before it is validated."""
        self._validation_clock = time.monotonic()
        self._check_ranges()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._finish_if_done()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Teacher, round-to-nearest and student on one batch of images, with or without labels."""
        images, labels = _images_and_labels(batch)
        predictions = {"teacher": classes(self.teacher(images)), "student": classes(self.student(images))}
        with initial_ranges(self.student):
            predictions["nearest"] = classes(self.student(images))
        for name, prediction in predictions.items():
            if labels is not None and labels.shape == prediction.shape:
                self._rate(f"{name}_top1", prediction, labels)
            if name != "teacher":
                self._rate(f"{name}_agreement", prediction, predictions["teacher"])

    def on_validation_end(self) -> None:
        """Account for the time that validation took."""
        self.session.wall_seconds["validation"] += time.monotonic() - self._validation_clock

    def on_test_start(self) -> None:
        """Refuse to pass the float network off as the quantized one."""
        self._check_ranges()

    def on_predict_start(self) -> None:
        """Refuse to pass the float network off as the quantized one."""
        self._check_ranges()

    def _check_ranges(self) -> None:
        """A quantizer without ranges passes floats through; in a fit that is a sanity check, elsewhere an error."""
        if self.trainer.state.fn != "fit" and not all(q.enabled for q in weight_quantizers(self.student)):
            raise PTQError("the quantizers have no ranges yet: run fit first, or give ckpt_path, a fit's checkpoint.")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same as `validation_step`."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The student's output for one batch of images."""
        return self(_images_and_labels(batch)[0])  # type: ignore[no-any-return]

    @property
    def reports(self) -> list[UnitReport]:
        """What calibration did to each finished unit."""
        return self.session.reports

    def forward(self, x: Tensor) -> Tensor:
        """The student's output for images (N, C, H, W)."""
        return self.student(x)  # type: ignore[no-any-return]

    def on_train_epoch_end(self) -> None:
        """Judge the unit before it is written to a checkpoint."""
        self._finish_if_done()

    def on_train_end(self) -> None:
        """Drop the caches and select no unit: from here on the student is the same with and without gradients."""
        self.leave_units()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out; add what identifies the run and what is known of the finished units."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("teacher.")}
        checkpoint["lightning_ptq"] = {
            "model": self._model_digest,
            "structure": self._structure(),
            "settings": self._settings(),
            "session": self.session.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another run's checkpoint; give the live teacher's tensors back so that loading stays strict."""
        saved = checkpoint.get("lightning_ptq")
        if saved is None:
            raise PTQError("the checkpoint was not written by lightning_ptq. Give one from a fit's checkpoints folder.")
        check_same(saved["structure"], self._structure(), "quantization config")
        if saved["model"] != self._model_digest:
            raise PTQError(
                "the checkpoint belongs to a model with other weights. Give the weights that it was calibrated from."
            )
        if self._trainer is not None and self.trainer.state.fn == "fit":
            check_same(saved["settings"], self._settings(), "calibration setting")
        self.session.load_state(saved["session"])
        checkpoint["state_dict"].update({f"teacher.{k}": v for k, v in self.teacher.state_dict().items()})

    # ---- units ----

    def enter_unit(self, unit: int) -> None:
        """Make `unit` the one that is calibrated: caches advanced to it, only its parameters trained."""
        rank, size = self.global_rank, self.trainer.world_size
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.session.enter(
            unit,
            lambda: data.calibration_images(rank, size),
            World(self.device, size, self._all),
            config=self.quant,
            batch_size=self.batch_size,
            policy=self.cache_policy,
            weighting=self.method.weighting,
        )
        self._select(unit)
        optimizer = self.trainer.optimizers[0]
        current = {id(p) for p in self.student.units[unit].parameters()}
        for parameter in [p for p in optimizer.state if id(p) not in current]:
            del optimizer.state[parameter]
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            # DDP registers what requires grad when it wraps; without a new wrap the ranks diverge silently.
            strategy.model = strategy.lightning_module
            strategy.configure_ddp()

    def judge_last_unit(self) -> None:
        """Judge a unit that was not because the fit resumed behind its last step, where Lightning runs no loop."""
        done = self.trainer.current_epoch
        if len(self.session.reports) < done and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.enter_unit(done - 1)
            self._finish(done - 1)
            self.leave_units()

    def leave_units(self) -> None:
        """Train no unit any more and drop the caches."""
        self.session.close()
        self._select(None)

    def _finish_if_done(self) -> None:
        """Judge the current unit unless it was stopped in the middle (max_steps, max_time)."""
        if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._finish(self.trainer.current_epoch)

    def _finish(self, unit: int) -> None:
        """Judge `unit` if it was not yet, and log what its report says."""
        report = self.session.finish(unit)
        if report is not None:
            numbers = {k: v for k, v in report.to_dict().items() if isinstance(v, float)}
            for logger in self.loggers:
                logger.log_metrics({f"units/{report.name}/{k}": v for k, v in numbers.items()}, step=self.global_step)

    def _select(self, unit: int | None) -> None:
        """Train and drop in `unit` only, or nowhere. The teacher, weights and other units never require gradients."""
        self.teacher.requires_grad_(False)
        self.student.requires_grad_(False)
        for q in act_quantizers(self.student):
            q.drop = None
        if unit is None:
            return
        for act in act_quantizers(self.student.units[unit]):
            act.log_scale.requires_grad_(self.method.scales != "none")
            act.drop = self._drop
        for weight in weight_quantizers(self.student.units[unit]):
            if weight.alpha is not None:
                weight.alpha.requires_grad_(True)

    def _unit_input(self, batch: Minibatch) -> Tensor:
        if self.method.input == "fp":
            return batch.teacher_in
        keep = self._drop.keep(batch.student_in) if self.method.input == "mix" else None
        return batch.student_in if keep is None else torch.lerp(batch.teacher_in, batch.student_in, keep)

    def _teacher_inner(self, unit: int, batch: Minibatch) -> list[Tensor]:
        """What the teacher's unit computes where layers end inside it."""
        with torch.no_grad(), recorded(self.teacher.units[unit]) as inner:
            self.teacher.units[unit](batch.teacher_in)
        return inner

    def _tail(self, x: Tensor) -> Tensor:
        """The teacher from the current unit's output on, at the Trainer's precision."""
        with self.trainer.precision_plugin.forward_context():
            return self.teacher(x, start=self.trainer.current_epoch + 1)  # type: ignore[no-any-return]

    def _set_rates(self, progress: float) -> None:
        """Learning rates as a function of progress alone, so that resuming needs no scheduler state."""
        rounding, scales = self.method.rate_factors(progress)
        rates = {"rounding": rounding * self.rounding_lr, "scales": scales * self.scale_lr}
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rates[group["name"]]

    def _rate(self, name: str, prediction: Tensor, reference: Tensor) -> None:
        metric = self.rates[name]
        assert isinstance(metric, MeanRate)
        metric.update(prediction, reference)
        self.log(name, metric, on_step=False, on_epoch=True, batch_size=len(prediction))

    def _all(self, x: Tensor) -> Tensor:
        """`x` of every process, stacked: (world, ...)."""
        x = x.to(self.device).contiguous()
        if self.trainer.world_size == 1:
            return x[None]
        # Not `self.all_gather`: in Lightning 2.6 it calls what torch deprecates, and no gradient is needed here.
        parts = [torch.empty_like(x) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(parts, x)
        return torch.stack(parts)

    def _structure(self) -> dict[str, Any]:
        """Settings that decide which parameters there are and what they mean."""
        return self.quant.to_dict() | {"granularity": self.method.granularity, "rounding": self.method.rounding}

    def _settings(self) -> dict[str, Any]:
        """Settings that decide how calibration proceeds."""
        return {
            "method": self.method_name,
            "input": self.method.input,
            "scales": self.method.scales,
            "drop": self.method.drop,
            "weighting": self.method.weighting,
            "contrastive": self.contrastive,
            "steps_per_unit": self.steps_per_unit,
            "batch_size": self.batch_size,
            "rounding_lr": self.rounding_lr,
            "scale_lr": self.scale_lr,
            "rounding_weight": self.rounding_weight,
            "critic": asdict(self.critic),
            "seed": self.seed,
        }


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and, if there are any, labels of a validation batch."""
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return batch[0], batch[1] if len(batch) > 1 and isinstance(batch[1], Tensor) else None
    return batch, None
