"""What a fit shows and leaves behind: progress by unit, a checkpoint for every unit, the summary and its table."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_ptq.checks import check_run_folder, run_folder
from lightning_ptq.metrics import RATES
from lightning_ptq.network import NETWORK

if TYPE_CHECKING:
    from lightning_ptq.module import PTQModule

# Steps after which a unit is long enough to be worth checkpoints in its middle.
_LONG_UNIT = 1000


def unit_title(trainer: L.Trainer) -> str:
    """ "unit k/K name" of the epoch in progress."""
    names = trainer.lightning_module.epoch_names
    unit = min(trainer.current_epoch, len(names) - 1)  # type: ignore[arg-type]
    return f"unit {unit + 1}/{len(names)} {names[unit]}"  # type: ignore[index,arg-type]


def current_terms(trainer: L.Trainer, metrics: dict[str, Any]) -> dict[str, Any]:
    """What of a bar's `metrics` says something: no version number, no term that was left behind by another epoch."""
    module: PTQModule = trainer.lightning_module  # type: ignore[assignment]
    objectives = [module.objective, module.network_objective]
    current = objectives.pop(trainer.current_epoch >= len(module.student)).terms
    (other,) = objectives
    stale = {"v_num", *other.terms} - set(current)
    return {key: value for key, value in metrics.items() if key not in stale}


class UnitRichBar(RichProgressBar):
    """Lightning's rich bar with units in the place of epochs."""

    def _get_train_description(self, current_epoch: int) -> str:
        return unit_title(self.trainer)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The loss terms of the epoch in progress."""
        return current_terms(trainer, super().get_metrics(trainer, pl_module))

    def disable(self) -> None:
        """Draw no more: what is printed from here on comes behind the bar, in a pipe too."""
        super().disable()
        if self.progress is not None:
            self.progress.stop()


class UnitTQDMBar(TQDMProgressBar):
    """Lightning's tqdm bar with units in the place of epochs."""

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(unit_title(trainer))

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The loss terms of the epoch in progress."""
        return current_terms(trainer, super().get_metrics(trainer, pl_module))


class UnitCheckpoint(ModelCheckpoint):
    """`last.ckpt` after every unit, after it was judged, and where a fit is stopped in the middle of one.

    Only the newest is kept: it holds all that the earlier ones hold. It is saved explicitly: with `save_top_k=0`
    Lightning itself saves nothing before training ends.
    """

    def __init__(self) -> None:
        super().__init__(
            save_top_k=0, save_last=True, every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save where the loop ends by max_steps, max_time or a signal, since after it the epoch counts as done, and
        before a validation, any of whose images may be broken."""
        stops = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        every = trainer.check_val_every_n_epoch
        validates = trainer.enable_validation and every is not None and (trainer.current_epoch + 1) % every == 0
        if validates if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch else stops:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save unless the unit was stopped in its middle, which a resumed run would then skip."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class StepCheckpoint(ModelCheckpoint):
    """`last.ckpt` every thousand steps too, for units that take long."""

    def __init__(self) -> None:
        super().__init__(save_top_k=0, save_last=True, every_n_train_steps=_LONG_UNIT, enable_version_counter=False)


class RunSummary(Callback):
    """Writes `summary.json` to the run folder and prints the table teacher / nearest / calibrated."""

    def __init__(self) -> None:
        # Of the last validation, and the epoch that it followed; a resumed fit may have none of its own.
        self.metrics: dict[str, float] = {}
        self.epoch = -1

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics, self.epoch = state_dict["metrics"], state_dict["epoch"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what was measured."""
        if not trainer.sanity_checking:
            self.epoch = trainer.current_epoch
            self.metrics = {
                key: float(trainer.callback_metrics[key]) for key in RATES if key in trainer.callback_metrics
            }

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a folder that holds another run; only now Lightning tells whether a checkpoint is continued."""
        check_run_folder(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the student as it would be used, also after an interrupt."""
        pl_module.leave_units()  # type: ignore[operator]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and print; rank 0 only."""
        module: PTQModule = pl_module  # type: ignore[assignment]
        module.judge_last_unit()
        folder = run_folder(trainer)
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        module.session.wall_seconds["total"] += time.monotonic() - self._start
        # What was measured before the last epoch says nothing about the network as it is now.
        summary = summarize(module, trainer, self.metrics if self.epoch == trainer.current_epoch - 1 else {})
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "summary.json", summary)
        bar = trainer.progress_bar_callback
        if bar is not None:
            bar.disable()  # a live bar would be drawn over the result
        print(f"{table(summary)}\nsummary: {folder / 'summary.json'}", flush=True)  # noqa: T201 (the result)


def summarize(module: PTQModule, trainer: L.Trainer, metrics: dict[str, float]) -> dict[str, Any]:
    """The content of `summary.json`; `metrics` are the rates of the last validation."""
    samples = trainer.datamodule.calibration_samples  # type: ignore[attr-defined]
    return {
        "model": module.model_name,
        "method": module.method_name,
        "contrastive": module.contrastive,
        "weight_bits": module.quant.weight_bits,
        "act_bits": module.quant.act_bits,
        "edges": module.quant.edges,
        "placement": module.quant.placement,
        "granularity": module.method.granularity,
        "seed": module.seed,
        "calibration_samples": samples if module.session.image_count is None else module.session.image_count,
        "steps_per_unit": module.steps_per_unit,
        "network_steps": module.network_steps,
        "complete": len(module.reports) == len(module.epoch_names),
        **{key: metrics.get(key) for key in ("teacher_top1", "nearest_top1", "student_top1")},
        "teacher_agreement": metrics.get("student_agreement"),
        "nearest_agreement": metrics.get("nearest_agreement"),
        "calibration_agreement": module.session.calibration_agreement,
        "overfit_gap": overfit_gap(module.session.calibration_agreement, metrics.get("student_agreement")),
        "wall_seconds": {key: round(value, 3) for key, value in module.session.wall_seconds.items()},
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(module.device) if module.device.type == "cuda" else 0,
        # JSON has no infinity: an SQNR without noise, or of a constant output, is null.
        "units": [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in unit.items()
            }
            for unit in (report.to_dict() for report in module.reports)
        ],
    }


def overfit_gap(calibration: float | None, validation: float | None) -> float | None:
    """How many points more often the student agrees with the teacher on what it was calibrated with than elsewhere."""
    return None if calibration is None or validation is None else calibration - validation


class PredictionFile(Callback):
    """Writes what `predict` computes to `predictions.pt` in the run folder: the student's outputs (images, ...).

    For the command line, which drops what the Trainer returns. With several processes, each writes a file of its own.
    """

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._outputs: list[Tensor] = []

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self._outputs.append(outputs.cpu())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and say where."""
        if not self._outputs:
            return
        rank = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = run_folder(trainer) / f"predictions{rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(self._outputs), path)
        print(f"predictions: {path}", flush=True)  # noqa: T201 (the result)


def table(summary: dict[str, Any]) -> str:
    """The result as text: one row each for teacher, round-to-nearest and calibrated student."""

    def cell(value: float | None) -> str:
        return f"{value:9.2f}" if value is not None else "        -"

    bits = f"W{summary['weight_bits']}A{summary['act_bits']}"
    rows = [
        ("teacher, float32", summary["teacher_top1"], 100.0 if summary["teacher_agreement"] is not None else None),
        (f"nearest, {bits}", summary["nearest_top1"], summary["nearest_agreement"]),
        (f"{summary['method']}{' + contrastive' if summary['contrastive'] else ''}, {bits}", summary["student_top1"],
         summary["teacher_agreement"]),
    ]  # fmt: skip
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'':{width}} {'top-1 %':>9} {'agreement with the teacher %':>30}"]
    lines += [f"{name:{width}} {cell(top1)} {cell(agreement):>30}" for name, top1, agreement in rows]
    if not summary["complete"]:
        lines.append(
            f"not finished: {len(summary['units'])} units are done. To go on, give ckpt_path, the run's "
            "checkpoints/last.ckpt, and lift what stopped it (max_steps, max_epochs, max_time)."
        )
    rolled_back = [unit["name"] for unit in summary["units"] if not unit["accepted"]]
    units = [name for name in rolled_back if name != NETWORK]
    if units:
        lines.append(
            f"kept as rounded to nearest, since calibration did not improve them: {', '.join(map(repr, units))}"
        )
    if NETWORK in rolled_back:
        lines.append("kept as the units left it, since the last epoch did not improve it: the whole network")
    return "\n".join(["", *lines])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary file, flush, rename: a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def model_callbacks(trainer: L.Trainer, module: PTQModule) -> list[Callback]:
    """Callbacks that the module brings; what the user configured stays.

    A bar or checkpoint callback takes the place of Lightning's default one because it is its subclass.
    """
    callbacks: list[Callback] = [RunSummary()]
    bar = trainer.progress_bar_callback
    if type(bar) is RichProgressBar:
        callbacks.append(UnitRichBar())
    elif type(bar) is TQDMProgressBar:
        callbacks.append(UnitTQDMBar(refresh_rate=bar.refresh_rate))
    defaults = [_is_default(callback) for callback in trainer.checkpoint_callbacks]
    if defaults and all(defaults) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        callbacks.append(UnitCheckpoint())
        if max(module.steps_per_unit, module.network_steps) > _LONG_UNIT:
            callbacks.append(StepCheckpoint())
    return callbacks


def _is_default(callback: Callback) -> bool:
    """Whether this is the checkpoint callback that Lightning adds by itself."""
    return type(callback) is ModelCheckpoint and (
        callback.dirpath is None
        and callback.filename is None
        and callback.monitor is None
        and callback._every_n_train_steps == 0
        and not callback.save_last
    )
