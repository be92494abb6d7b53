"""`PTQModule`: calibration as one `Trainer.fit`, an epoch for each unit and one for the network. Orchestration only."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import nn

from lightning_ptq.allocator import keep_freed_memory
from lightning_ptq.augment import Augmentation
from lightning_ptq.calibration import UnitReport
from lightning_ptq.callbacks import model_callbacks
from lightning_ptq.checkpoint import arguments_of, read_checkpoint
from lightning_ptq.checks import (
    check_device,
    check_kind,
    check_network_steps,
    check_settings,
    check_trainer,
)
from lightning_ptq.config import Granularity, QuantConfig, check_option
from lightning_ptq.cpu_replay import CpuReplay
from lightning_ptq.drop import DropMask
from lightning_ptq.entering import Entering
from lightning_ptq.errors import PTQError
from lightning_ptq.fingerprint import model_digest
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.fold import statistics_of
from lightning_ptq.graph.given import plain
from lightning_ptq.loader import UnitLoader
from lightning_ptq.losses import ContrastiveConfig, Term
from lightning_ptq.losses.objectives import network_objective, unit_objective
from lightning_ptq.memory import CachePolicy, bytes_of, unit_shapes
from lightning_ptq.methods import (
    MethodName,
    Rounding,
    ScaleLearning,
    UnitInput,
    Weighting,
    default_network_steps,
    default_rates,
    get_method,
)
from lightning_ptq.network import NETWORK
from lightning_ptq.optimizer import optimizer_of
from lightning_ptq.overhead import without_profiler
from lightning_ptq.quantizers import forget_ranges
from lightning_ptq.replay import Numbers
from lightning_ptq.resuming import FROZEN
from lightning_ptq.session import Session
from lightning_ptq.store import CacheType
from lightning_ptq.surroundings import Surroundings, likely_part, without_classes


class PTQModule(Entering):
    """Frozen full-precision teacher and quantized student; training optimises quantization parameters only.

    Args:
        model: the trained network, in eval mode; one image tensor (N, C, H, W) in, one tensor out, or a detector. It is
            not changed.
        quant: what to quantize to how many bits.
        method: preset "nearest", "adaround", "brecq", "qdrop", "pdquant" or "flexround" (see `methods.py`).
        contrastive: add the contrastive term of CL-Calib to the method's loss.
        critic: how that term is computed.
        steps_per_unit: optimisation steps for each unit.
        network_steps: optimisation steps of the last epoch, which calibrates the whole network (see `network.py`); 0
            leaves it out, None follows `steps_per_unit`, or takes 0 where there is nothing to learn.
        batch_size: calibration images for each step, on each process.
        rounding_lr: learning rate of the weights' rounding; None follows `steps_per_unit`.
        scale_lr: learning rate of the logarithm of activation scales and of corrections; None follows `steps_per_unit`.
        network_lr: learning rate of scales and corrections in the last epoch.
        network_rounding_lr: learning rate of the weights' rounding in the last epoch, 0 leaves it as the units did.
        network_features: weight of the last epoch's reconstruction of the head's input next to the divergence.
        augment: how images are changed at random in the last epoch; the teacher then runs along.
        rounding_weight: weight of AdaRound's regulariser; None finds one for each unit.
        granularity, input, rounding, scales, drop, drop_until, weighting, corrections, prediction,
            distribution_steps: coordinates of the method that differ from the preset.
        leaf_modules: name patterns of modules that are not traced and stay in floating point.
        image_shape: (C, H, W) of the images, for models that only `torch.export` can follow; None guesses it.
        part: qualified name of the submodule to quantize, all else stays in float; it takes one tensor and returns
            tensors. None takes all of the model, or the `backbone` of a detector; "" takes all in any case.
        terms: further loss terms of units by name; they do not join the last epoch.
        cache: where activations are kept: on the "device", on the "host", on "disk", or "auto": the first of these that
            has room (see `memory.py`).
        memory_budget: what they may take in memory on each process, in bytes or with a unit ("8GB"); None: half of
            what is free.
        cache_dtype: "bfloat16" rounds what is kept, which halves it; all computation stays as it is.
        cache_folder: for those on disk; None takes the run folder.
        held_out: so many images more than the data's `calibration_samples`, as a share of that number, judge each unit
            and the whole network, where the data has more; no step draws them.
        settle: a unit's steps are cut short once the error of the images that judge it falls by less than this share
            within a tenth of them (see `settling.py`); 0 takes all steps.
        allow_drift: go on with a checkpoint of other weights, settings, images or of another major version; a warning
            names what differs.
        report: draw `report.html` when a fit ends. Without, `lightning-ptq report RUN` draws it at any time.
        record_steps: in one process, record steps once and play them back (see `replay.py`): faster, the same numbers.
            Not with accumulated or clipped gradients, callbacks that look at gradients, float16, `augment` in the last
            epoch, or terms that do not allow it.
        steps_per_batch: optimisation steps of what Lightning takes for one batch and one step, since its loop takes
            as long as a recorded step on a GPU, and a tenth of one on a CPU. None takes a hundredth of
            `steps_per_unit`, at most 20 on a GPU and 5 on a CPU, but 1 where steps are not recorded or the Trainer
            counts batches (`max_steps`, `limit_train_batches`, `val_check_interval`); where a run is resumed, what
            its checkpoint has.
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
        network_steps: int | None = None,
        batch_size: int = 32,
        rounding_lr: float | None = None,
        scale_lr: float | None = None,
        network_lr: float = 4e-3,
        network_rounding_lr: float = 2e-2,
        network_features: float = 30.0,
        augment: Augmentation = Augmentation(),  # noqa: B008 (frozen)
        rounding_weight: float | None = None,
        granularity: Granularity | None = None,
        input: UnitInput | None = None,
        rounding: Rounding | None = None,
        scales: ScaleLearning | None = None,
        drop: float | None = None,
        drop_until: float | None = None,
        weighting: Weighting | None = None,
        corrections: bool | None = None,
        prediction: float | None = None,
        distribution_steps: int | None = None,
        leaf_modules: Sequence[str] = (),
        image_shape: Sequence[int] | None = None,
        part: str | None = None,
        terms: dict[str, Term] | None = None,
        cache: CachePolicy = "auto",
        memory_budget: int | str | None = None,
        cache_dtype: CacheType = "float32",
        cache_folder: str | None = None,
        held_out: float = 0.1,
        settle: float = 0.0,
        allow_drift: bool = False,
        report: bool = True,
        record_steps: bool = True,
        steps_per_batch: int | None = None,
        seed: int | None = None,
    ) -> None:
        check_kind(model, nn.Module, "model", "the trained network itself")
        check_kind(quant, QuantConfig, "quant", "QuantConfig(weight_bits=4, act_bits=4)")
        check_settings(
            steps_per_unit=steps_per_unit,
            network_steps=network_steps,
            batch_size=batch_size,
            rounding_lr=rounding_lr,
            scale_lr=scale_lr,
            network_lr=network_lr,
            network_rounding_lr=network_rounding_lr,
            network_features=network_features,
            rounding_weight=rounding_weight,
            held_out=held_out,
            settle=settle,
            steps_per_batch=steps_per_batch,
        )
        coordinates = get_method(
            method,
            granularity=granularity,
            input=input,
            rounding=rounding,
            scales=scales,
            drop=drop,
            drop_until=drop_until,
            weighting=weighting,
            corrections=corrections,
            prediction=prediction,
            distribution_steps=distribution_steps,
        )
        built = {"leaf_modules": list(leaf_modules), "image_shape": image_shape and list(image_shape)}
        model = plain(model)
        part = likely_part(model) if part is None else part or None
        surroundings = None if part is None else Surroundings(model, part)
        if surroundings is not None:
            image_shape = None if image_shape is None else surroundings.shape_of(image_shape)
        chains = build_chain(
            model if part is None else model.get_submodule(part),
            quant,
            coordinates.granularity,
            rounding=coordinates.rounding,
            leaf_modules=leaf_modules,
            image_shape=image_shape,
            is_part=part is not None,
        )
        super().__init__(chains.teacher, chains.student, surroundings)
        self.chains, self.method = chains, coordinates
        if part is not None:
            critic = without_classes(coordinates, critic)
        self.method_name, self.quant, self.critic = method, quant, critic
        self.contrastive = contrastive = contrastive and coordinates.learns
        self.model_name, self.rounding_weight = type(model).__name__, rounding_weight
        self.held_out, self.leaf_modules, self._built = held_out, tuple(leaf_modules), built
        self.allow_drift, self.draws_report, self.record_steps = allow_drift, report, record_steps
        # What learns nothing needs no steps; one keeps Lightning's loop, and so validation and checkpoints, alive.
        self.steps_per_unit = steps_per_unit if self.method.learns else 1
        check_option(cache, get_args(CachePolicy), "cache")
        check_option(cache_dtype, get_args(CacheType), "cache_dtype")
        self.batch_size, self.cache_policy, self.cache_dtype = batch_size, cache, cache_dtype
        self.memory_budget, self.cache_folder = bytes_of(memory_budget), cache_folder
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        default_rounding_lr, default_scale_lr = default_rates(self.steps_per_unit)
        self.rounding_lr = default_rounding_lr if rounding_lr is None else rounding_lr
        self.scale_lr = default_scale_lr if scale_lr is None else scale_lr

        term = critic if contrastive else None
        self.objective = unit_objective(coordinates, rounding_weight, term, terms or {}, len(self.student))
        self.network_objective = network_objective(network_features, term)
        self.network_features, self.network_rounding_lr = network_features, network_rounding_lr
        self.network_steps = self._network_steps(network_steps)
        self.network_lr = network_lr
        if augment and not self.network_steps:
            raise PTQError("augment changes images in the last epoch, and there is none. Leave it out.")
        if self.method.distribution_steps and quant.pairs != "none":
            raise PTQError("distribution_steps compares with statistics that pairs='smooth' rescales. Leave one out.")
        if self.method.distribution_steps and not any(map(statistics_of, self.teacher.modules())):
            raise PTQError("distribution_steps needs a batch norm that was folded, and there is none. Leave it out.")
        self.augment = augment
        self.epoch_names = (*self.student.names, *([NETWORK] if self.network_steps else []))
        # Lightning and DDP insist on a gradient; a unit that has nothing to learn gives them this one.
        self.anchor = nn.Parameter(torch.zeros(()))

        self.settle = settle
        self.session = Session(self.teacher, self.student, settle)
        self.model_digest = model_digest(self.teacher)
        if surroundings is not None:  # what the part reads depends on them
            self.model_digest += model_digest(surroundings)
        self._drop = DropMask(self.method.drop)
        self._replay, self._numbers = CpuReplay(), Numbers()
        self._asked_per_batch, self.steps_per_batch = steps_per_batch, steps_per_batch or 1
        # Equal on all ranks by construction, and DDP wraps anew for every unit.
        self._ddp_params_and_buffers_to_ignore = [name for name in self.state_dict() if name.startswith(FROZEN)]
        self._select(None)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", *, model: nn.Module, **changes: Any
    ) -> PTQModule:
        """The calibrated module that wrote a checkpoint.

        Args:
            checkpoint_path: a fit's `checkpoints/last.ckpt`.
            map_location: the device to put it on.
            model: the trained network, as in that fit.
            changes: arguments of `PTQModule` in place of the checkpoint's.

        Raises:
            PTQError: a file that is no such checkpoint or is damaged, or a model with other weights.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        module = cls(model, **(arguments_of(checkpoint) | changes))
        module.restore(checkpoint)
        return module.to(map_location).eval()

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take over the state in a checkpoint; errors as those of `load_from_checkpoint`."""
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])

    def _network_steps(self, asked: int | None) -> int:
        """Steps of the last epoch, or 0 where it has nothing to learn or nothing before its head."""
        learns = self.method.learns_network(self.network_rounding_lr > 0)
        if self.student.is_part:
            if asked:
                raise PTQError(f"network_steps={asked}: that epoch compares class scores, and a part has none. Use 0.")
            return 0
        if learns and len(self.student) > 1:
            return default_network_steps(self.steps_per_unit) if asked is None else asked
        if asked and self.method.learns:
            reason = (
                f"needs two units or more, but granularity={self.method.granularity!r} cuts this network into one"
                if learns
                else "has nothing to learn with scales='none', corrections=False and network_rounding_lr=0"
            )
            raise PTQError(f"network_steps={asked} {reason}. Leave it out, or change that.")
        return 0

    # ---- Lightning's hooks, in the order in which a fit calls them ----

    def configure_callbacks(self) -> list[L.Callback]:
        """Progress by unit, a checkpoint for every unit, and the run's summary."""
        return model_callbacks(self.trainer, self)

    def setup(self, stage: str) -> None:
        """Refuse what can't work and fit the Trainer to the chain before anything long starts."""
        if stage != "fit":
            return
        self._began = time.monotonic()
        check_trainer(self.trainer)
        without_profiler(self.trainer)
        check_device(self.trainer.strategy.root_device)
        self.set_steps_per_batch()
        shape = self.trainer.datamodule.image_shape  # type: ignore[attr-defined]
        if shape is not None and self.surroundings is None:
            unit_shapes(self.teacher, tuple(shape))  # images that the network can't take are refused here
        # Both networks are frozen in eval mode on purpose.
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode", PossibleUserWarning)
        # A forked process has to make PyTorch's pool of threads anew; where autograd's thread and this one both try, it
        # aborts ("Invalid thread pool!"). Lightning does this only where OMP_NUM_THREADS is not set.
        torch.set_num_threads(torch.get_num_threads())
        # The first product of a process may be one of a backward pass, whose thread finds its GPU then.
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        # What DDP sees when it wraps for the first time, before the first unit is entered.
        self._select(0)
        loop, epochs = self.trainer.fit_loop, len(self.epoch_names)
        loop.max_epochs = epochs if loop.max_epochs is None or loop.max_epochs < 0 else min(epochs, loop.max_epochs)
        # Epochs may be shorter than the logging interval; reports are logged all the same.
        warnings.filterwarnings("ignore", r"The number of training batches", PossibleUserWarning)
        if self.network_steps:
            # Epochs differ in length, and Lightning asks a loader for its length only when it loads it. The unit loader
            # has no state that would be lost. A larger number would be counted from where a fit is resumed.
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        self._limit_val_batches = self.trainer.limit_val_batches
        if self.trainer.datamodule.val_dataloader() == []:  # type: ignore[attr-defined]
            self.trainer.limit_val_batches = 0
        if self.network_steps and loop.max_epochs == epochs:
            check_network_steps(self.trainer, self.batches_of(epochs - 1))
        if self.trainer.check_val_every_n_epoch == 1:
            # Lightning's default would validate after every unit; what counts is the finished network.
            self.trainer.check_val_every_n_epoch = max(loop.max_epochs, 1)

    def on_fit_start(self) -> None:
        """Start anew, also on a module that was fitted before, unless a checkpoint is continued.

        Not earlier: a fit that is refused must leave the module as it was.
        """
        if not self.trainer.ckpt_path:
            self.session = Session(self.teacher, self.student, self.settle)
            forget_ranges(self.student)

    def on_train_start(self) -> None:
        """Go on with the next unit where a checkpoint was written behind the last step of one.

        Lightning takes such an epoch for finished only if the next one is as long and if `max_steps` is not set.
        """
        loop = self.trainer.fit_loop
        current: Any = loop.epoch_progress.current
        if loop.restarted_on_epoch_end or current.completed == current.ready:
            current.completed = current.processed
            loop._restarting = False
            loop.reset_restart_stage()
            loop.epoch_loop.restarting = False
        elif loop.restarted_mid_epoch and loop.epoch_loop.batch_progress.is_last_batch:
            loop.epoch_loop.restarting = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam over all quantization parameters; those of other units have no gradients and are skipped."""
        return optimizer_of(self.student)

    def unit_loader(self) -> UnitLoader:
        """The loader of calibration steps, which a datamodule returns as its train loader."""
        return UnitLoader(self)

    def on_validation_start(self) -> None:
        """Inside `fit`, judge a unit whose steps are done before it is validated."""
        self._check_ranges()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._finish_if_done()
        self._validation_clock = time.monotonic()

    def on_validation_end(self) -> None:
        """Account for the time that validation took."""
        self.session.wall_seconds["validation"] += time.monotonic() - self._validation_clock

    @property
    def reports(self) -> list[UnitReport]:
        """What calibration did to each finished unit."""
        return self.session.reports

    def on_train_epoch_end(self) -> None:
        """Judge the unit before it is written to a checkpoint."""
        self._finish_if_done()

    def teardown(self, stage: str) -> None:
        """Leave the Trainer's limit as it was: it may validate with other loaders next."""
        if stage == "fit":
            self.trainer.limit_val_batches = self._limit_val_batches

    def on_train_end(self) -> None:
        """Drop the caches and select no unit: from here on the student is the same with and without gradients."""
        self.leave_units()
