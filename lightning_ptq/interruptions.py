"""What becomes of a fit that is interrupted: by a full disk, a signal, or the end of one of its processes."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_ptq.files import write_whole

# What a shell adds to the number of the signal that ended a process.
_SHELLS = 128
_STOPS = b"\nCtrl+C: the fit ends after this step. Once more ends it at once.\n"
# Steps between two questions whether any process was told to stop: one small message each.
_ASK_EVERY = 20
# Where a command's first process leaves its number for those that Lightning starts.
LAUNCHER = "LIGHTNING_PTQ_LAUNCHER"
# What gloo and NCCL say when a process at the other end is gone.
_GONE = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
_LOST = (
    "another process of this run has ended: its own message says why, if it could leave one. "
    "Put that right and go on with --ckpt_path last."
)


class WholeCheckpoints(TorchCheckpointIO):
    """A checkpoint is written beside the one it replaces, flushed to the disk and renamed.

    Lightning 2.6 flushes nothing and writes to the folder for temporary files; where that is another disk, it copies
    over the last checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """As `write_whole`; what is no local file is Lightning's business."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # writing to a file by itself, torch would not tell why the disk takes no more
        torch.save(checkpoint, buffer)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda to: to.write_bytes(buffer.getbuffer()))


class Interruptions(Callback):
    """Whole checkpoints; at SIGTERM and Ctrl+C a checkpoint after the step in progress, by all processes alike.

    Exit codes are 143 and 130. A second Ctrl+C, and one outside of steps, where there is nothing to save, ends at once.
    Lightning 2.6 ends without a checkpoint, at SIGTERM with exit code 0, for which who forked or spawned the process
    waits on; and its handler sends a message to the other processes, from whatever step each is at.
    """

    def __init__(self) -> None:  # for every fit anew, by `configure_callbacks`
        self._told = 0  # the number of the signal that told this process to stop
        self._unsaved = False  # whether there may be steps that no checkpoint has

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the place of Lightning's own checkpoint writer, but of no other."""
        if stage == "fit" and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As at the start of training, which comes later."""
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the place of the handlers that Lightning put aside and will put back."""
        # What Lightning's was told before; its loops end at once where that is set, each process for itself.
        if trainer.received_sigterm:
            self._told = signal.SIGTERM
        trainer._signal_connector.received_sigterm = False
        if threading.current_thread() is not threading.main_thread():
            return
        handlers = trainer._signal_connector._original_handlers
        terminate, interrupt = handlers.get(signal.SIGTERM), handlers.get(signal.SIGINT)
        process = os.getpid()

        def terminated(number: int, frame: Any) -> None:
            self._told = number
            if callable(terminate):
                terminate(number, frame)

        def interrupted(number: int, frame: Any) -> None:
            if os.getpid() != process:
                return  # a worker of a loader, which has the handler too: the loader ends it
            if self._told or not self._unsaved:
                signal.default_int_handler(number, frame)
            self._told = number
            if trainer.is_global_zero:
                with suppress(OSError):  # who reads it may have ended by the same Ctrl+C: `2>&1 | tee`
                    os.write(2, _STOPS)  # print is not safe in a handler

        signal.signal(signal.SIGTERM, terminated)
        if interrupt is signal.default_int_handler:  # a shell has its background jobs ignore Ctrl+C, say
            signal.signal(signal.SIGINT, interrupted)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The checkpoint of the unit before is written; entering the next one may take long."""
        self._unsaved = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """From here on Ctrl+C waits for a checkpoint."""
        self._unsaved = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Have Lightning's loop end here, behind the checkpoint that is written after this callback."""
        # Gradients that wait for the next batch's are in no checkpoint.
        accumulates = (batch_idx + 1) % trainer.accumulate_grad_batches != 0 and not _is_last(trainer)
        if not accumulates and (trainer.world_size == 1 or trainer.global_step % _ASK_EVERY == 0):
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same, behind the unit's checkpoint."""
        self._stop(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The unit's checkpoint is written, unless this is within a unit (`val_check_interval`)."""
        self._unsaved = self._unsaved and not _is_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is left to stop."""
        self._unsaved = False

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """One process may stop here too, where that loses nothing; several have no common place, since they may have
        uneven numbers of images."""
        if trainer.world_size == 1 and trainer.state.fn == TrainerFn.FITTING and not self._unsaved:
            self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        """Have Lightning's loop end if any process was told to. A collective call."""
        number = self._told
        if trainer.world_size > 1:
            told = torch.tensor(float(number), device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(told, reduce_op="max"))
        trainer._signal_connector.received_sigterm = number > 0
        if number:
            # Raised in three of Lightning's loops, and not seen by `on_exception` in a forked or spawned process.
            SIGTERMException.code = _SHELLS + number

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say that another process is the cause, where it is. What is left is not interrupted any more.

        Lightning sees to that at a KeyboardInterrupt. Comes before what a summary does.
        """
        handlers, main = trainer._signal_connector._original_handlers, threading.main_thread()
        if isinstance(exception, SIGTERMException) and handlers and threading.current_thread() is main:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the teardown puts back what was there
        if trainer.world_size > 1 and lost_process(exception):
            exception.args = (f"{_LOST} (process {trainer.global_rank}: {exception})",)


def _is_last(trainer: L.Trainer) -> bool:
    """Whether the batch in progress is the last of its unit."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def lost_process(error: BaseException) -> bool:
    """Whether this is what a process raises that waited for one that is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _GONE)


def end_with_launcher(trainer: L.Trainer) -> None:
    """End this process, wherever its fit waits, soon after the one ended that started it as one of several.

    Lightning watches over the processes it started from the first one; nobody would watch over that one, and the others
    would look for it for half an hour.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    fits = trainer.state.fn == TrainerFn.FITTING
    if not fits or not isinstance(environment, LightningEnvironment) or trainer.local_rank == 0:
        return
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))

    def watch() -> None:
        while trainer.state.status == TrainerStatus.RUNNING:
            if os.getppid() != launcher:
                print(f"process {trainer.local_rank} ends, since the one that started it did", file=sys.stderr)  # noqa: T201
                os._exit(1)
            time.sleep(1)

    threading.Thread(target=watch, name="end-with-launcher", daemon=True).start()
