"""What a fit brings with it and leaves behind: a checkpoint for every unit, predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_ptq.checks import run_folder
from lightning_ptq.files import write_whole
from lightning_ptq.interruptions import Interruptions, end_with_launcher
from lightning_ptq.progress import UnitRichBar, UnitTQDMBar
from lightning_ptq.summary import RunSummary

if TYPE_CHECKING:
    from lightning_ptq.module import PTQModule

# Batches, of one step as a rule, after which a unit is long enough to be worth checkpoints in its middle.
_LONG_UNIT = 1000


class UnitCheckpoint(ModelCheckpoint):
    """`last.ckpt` after every unit, after it was judged, and where a fit is stopped in the middle of one.

    Only the newest is kept: it holds all that the earlier ones hold. It is saved explicitly: with `save_top_k=0`
    Lightning itself saves nothing before training ends.
    """

    def __init__(self) -> None:
        super().__init__(
            save_top_k=0, save_last=True, every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False
        )
        self._saved = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save where a signal or `max_time` ends the fit, and before a validation, whose images may be broken."""
        every = trainer.check_val_every_n_epoch
        validates = trainer.enable_validation and (every is None or (trainer.current_epoch + 1) % every == 0)
        stops = trainer.should_stop or trainer.received_sigterm
        if validates if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch else stops:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was judged, or where the Trainer's limits stop the unit."""
        self._save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save once where a run that was done already is continued: every run folder has its checkpoint."""
        if not self._saved and pl_module.reports:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._saved = True
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class StepCheckpoint(ModelCheckpoint):
    """`last.ckpt` every thousand batches too, for units that take long."""

    def __init__(self) -> None:
        super().__init__(save_top_k=0, save_last=True, every_n_train_steps=_LONG_UNIT, enable_version_counter=False)


class PredictionFile(Callback):
    """Writes what `predict` computes to `predictions.pt` in the run folder: outputs (images, ...), or detections.

    For the command line, which drops what the Trainer returns. With several processes, each writes a file of its own.
    """

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._outputs: list[Any] = []

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self._outputs.append(move_data_to_device(outputs, torch.device("cpu")))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and say where."""
        if not self._outputs:
            return
        rank = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = run_folder(trainer) / f"predictions{rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda to: torch.save(joined(self._outputs), to))
        print(f"predictions: {path}", flush=True)  # noqa: T201 (the result)


def joined(batches: Sequence[Any]) -> Any:
    """The outputs of all batches as one: tensors, lists with an entry for each image, or a list of what else it is."""
    if all(isinstance(batch, Tensor) for batch in batches):
        return torch.cat(list(batches))
    if all(isinstance(batch, list) for batch in batches):
        return [entry for batch in batches for entry in batch]
    return list(batches)


def model_callbacks(trainer: L.Trainer, module: PTQModule) -> list[Callback]:
    """Callbacks that the module brings, before any process waits for another; what the user configured stays.

    A bar or checkpoint callback takes the place of Lightning's default one because it is its subclass.
    """
    end_with_launcher(trainer)
    callbacks: list[Callback] = [Interruptions(), RunSummary()]
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
