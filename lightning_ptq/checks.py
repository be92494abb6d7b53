"""Refusals that need a Trainer or the calibration images, made before any long work starts."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from lightning_ptq.errors import PTQError

_SHARDING: tuple[tuple[str, type[Strategy]], ...] = (
    ("fsdp", FSDPStrategy),
    ("deepspeed", DeepSpeedStrategy),
    ("model_parallel", ModelParallelStrategy),
)
# Counts, and the least of each.
_LEAST = {"steps_per_unit": 1, "network_steps": 0, "batch_size": 1, "steps_per_batch": 1}
# What may be left to a rule.
_OPTIONAL = ("network_steps", "rounding_lr", "scale_lr", "rounding_weight", "steps_per_batch")
# Where callbacks see gradients before they are used.
_GRADIENT_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
_OURS = ("lightning", "pytorch_lightning", "lightning_ptq")
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


def check_kind(value: object, kind: type, name: str, instead: str) -> None:
    """Raise `PTQError` unless `value`, the argument `name`, is a `kind`."""
    if not isinstance(value, kind):
        given = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise PTQError(f"{name} is {given}, and has to be a {kind.__name__}. Give {instead}.")


def check_settings(**values: float | None) -> None:
    """Raise `PTQError` for a count below 1 or a negative rate or weight; None passes where a rule takes its place."""
    for name, value in values.items():
        if value is None and name in _OPTIONAL:
            continue
        if value is None or (isinstance(value, bool) and name not in _LEAST):
            raise PTQError(f"{name}={value} must be a number. Leave it out for the default.")
        if name in _LEAST:
            if not isinstance(value, int) or isinstance(value, bool):
                raise PTQError(f"{name}={value} must be a whole number, {_LEAST[name]} or more.")
            if value < _LEAST[name]:
                raise PTQError(f"{name}={value} is too small. Use {_LEAST[name]} or more.")
        elif name == "held_out" and not 0 <= value < 1:
            raise PTQError(
                f"held_out={value} is no share below 1. Use 0.1, the default, for a tenth more images, or 0 for none."
            )
        elif name == "settle" and not 0 <= value < 1:
            raise PTQError(f"settle={value} is no share below 1. Use 0.01 for a hundredth, or 0 to take all steps.")
        elif not 0 <= value < float("inf"):
            raise PTQError(f"{name}={value} must be a finite number that is not negative.")


def check_trainer(trainer: L.Trainer) -> None:
    """Raise `PTQError` for a Trainer that can't calibrate."""
    for name, strategy in _SHARDING:
        if isinstance(trainer.strategy, strategy):
            raise PTQError(
                f"strategy={name!r} shards parameters; calibration needs whole units. Use 'ddp' or one device."
            )
    if isinstance(trainer.strategy, DDPStrategy) and trainer.strategy._ddp_kwargs.get("static_graph"):
        raise PTQError(
            "static_graph=True fixes the set of trained parameters; it changes with every unit. Leave it out."
        )
    if trainer.precision not in _PRECISIONS:
        raise PTQError(
            f"precision={trainer.precision!r} would round the scales themselves. Use one of {', '.join(_PRECISIONS)}."
        )
    if trainer.precision == "16-mixed" and trainer.gradient_clip_val:
        raise PTQError(
            f"gradient_clip_val={trainer.gradient_clip_val} can't be had with precision='16-mixed', whose optimizer "
            "unscales gradients itself. Leave it out: Adam's steps do not grow with gradients."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise PTQError(
                f"{type(callback).__name__} averages parameters over steps; rounding must end at 0 or 1. Leave it out."
            )
    if not hasattr(trainer.datamodule, "calibration_images"):  # type: ignore[attr-defined]
        raise PTQError(
            "fit got an image loader or a plain datamodule; calibration draws its own batches from caches. Pass "
            "datamodule=CalibrationDataModule.from_loaders(calib_loader, val_loader), or .wrap(datamodule)."
        )


def leaves_gradients_alone(trainer: L.Trainer) -> bool:
    """Whether one process takes a step with each gradient, just as the backward pass gives it."""
    return (
        isinstance(trainer.strategy, SingleDeviceStrategy)
        and trainer.accumulate_grad_batches == 1
        and not trainer.gradient_clip_val
        and trainer.precision != "16-mixed"
        and not any(map(_looks_at_gradients, trainer.callbacks))  # type: ignore[attr-defined]
        and not _takes_steps_itself(trainer.lightning_module)
    )


def _looks_at_gradients(callback: L.Callback) -> bool:
    overrides = any(getattr(type(callback), hook) is not getattr(L.Callback, hook) for hook in _GRADIENT_HOOKS)
    return overrides or isinstance(callback, GradientAccumulationScheduler)


def _takes_steps_itself(module: L.LightningModule | None) -> bool:
    """Whether a module of the user's has hooks of its own around a step."""
    names = (*_GRADIENT_HOOKS, "backward", "configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad")
    hooks = [getattr(type(module), name) for name in names if module is not None]
    return any(hook.__module__.split(".")[0] not in _OURS for hook in hooks)


def counts_batches(trainer: L.Trainer) -> bool:
    """Whether the Trainer was told to do something at, or after, a number of batches or steps."""
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return (
        trainer.max_steps >= 0
        or trainer.limit_train_batches != 1.0
        or trainer.overfit_batches != 0  # type: ignore[attr-defined]
        or trainer.val_check_interval != 1.0
        or any(c._every_n_train_steps for c in checkpoints if not type(c).__module__.startswith("lightning_ptq."))
    )


def check_steps_per_batch(trainer: L.Trainer, steps: int, whose: str = "") -> None:
    """Raise `PTQError` if a batch can't be several steps."""
    if steps > 1 and not leaves_gradients_alone(trainer):
        raise PTQError(
            f"{whose}steps_per_batch={steps} needs one device, no accumulated or clipped gradients, no callback or "
            f"module hook that looks at them, and no precision='16-mixed'. Leave {'these' if whose else 'it'} out."
        )


def check_network_steps(trainer: L.Trainer, batches: int) -> None:
    """Raise `PTQError` for what Lightning would find wrong with the last epoch's length, but only when it begins."""
    limit = trainer.limit_train_batches
    taken = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    if taken == 0 and limit != 0:
        raise PTQError(
            f"limit_train_batches={limit} leaves nothing of the {batches} batches of the whole-network epoch. "
            "Raise it, or set network_steps."
        )
    interval = trainer.val_check_interval
    validates = trainer.limit_val_batches > 0 and trainer.check_val_every_n_epoch is not None
    if validates and isinstance(interval, int) and interval > taken:
        raise PTQError(
            f"val_check_interval={interval} is more than the {taken} batches of the whole-network epoch. "
            "Lower it, or set network_steps."
        )


def check_device(device: torch.device) -> None:
    """Raise `PTQError` for a device that can't calibrate."""
    if device.type == "mps":
        raise PTQError("accelerator='mps' has no float64, which range estimation needs. Use accelerator='cpu'.")


def run_folder(trainer: L.Trainer) -> Path:
    """Where a fit leaves what it makes. A collective call: every process must make it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def check_run_folder(trainer: L.Trainer) -> None:
    """Raise `PTQError` if the run folder already holds a run and this is not its continuation."""
    folder = run_folder(trainer)
    if trainer.ckpt_path or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    # A run that was killed while it wrote its first checkpoint left a hidden file and is no run to continue.
    for name, pattern in (("summary.json", "summary.json"), ("checkpoints", "checkpoints/[!.]*")):
        if any(folder.glob(pattern)):
            raise PTQError(
                f"the run folder {str(folder)!r} already holds a run ({name}). Choose another "
                "trainer.default_root_dir, or continue that run with ckpt_path."
            )
