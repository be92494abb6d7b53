"""What becomes of a fit that is interrupted: by a full disk, by SIGTERM, or by the end of one of its processes."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
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

# What a shell reports for a process that SIGTERM ended.
TERMINATED = 128 + signal.SIGTERM
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
    """Whole checkpoints; on SIGTERM a checkpoint after the step in progress, and exit code 143, on all processes alike.

    Lightning 2.6 ends at SIGTERM without a checkpoint and with exit code 0, for which who forked or spawned the process
    waits on; and its handler sends a message to the other processes, from whatever step each is at.
    """

    def __init__(self) -> None:
        self._terminated = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the place of Lightning's own checkpoint writer, but of no other."""
        if stage == "fit" and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nobody has told this fit to stop yet."""
        self._terminated = False

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As at the start of training, which comes later."""
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the place of Lightning's handler, which put the one before it aside and will put it back."""
        # What Lightning's was told before; its loops end at once where that is set, each process for itself.
        self._terminated |= trainer.received_sigterm
        trainer._signal_connector.received_sigterm = False
        # Raised in three of Lightning's loops, and not seen by `on_exception` in a process that was forked or spawned.
        SIGTERMException.code = TERMINATED
        if threading.current_thread() is not threading.main_thread():
            return
        before = trainer._signal_connector._original_handlers.get(signal.SIGTERM)

        def told(number: int, frame: Any) -> None:
            self._terminated = True
            if callable(before):
                before(number, frame)

        signal.signal(signal.SIGTERM, told)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Have Lightning's loop end here, behind the checkpoint that is written after this callback."""
        if trainer.world_size == 1:
            stop = self._terminated
        elif trainer.global_step % _ASK_EVERY == 0:
            told = torch.tensor(float(self._terminated), device=trainer.strategy.root_device)
            stop = bool(trainer.strategy.reduce(told, reduce_op="max"))
        else:
            return
        trainer._signal_connector.received_sigterm = stop

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """One process may stop here too; several have no common place, since they may have uneven numbers of images."""
        if trainer.world_size == 1:
            trainer._signal_connector.received_sigterm = self._terminated

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say that another process is the cause, where it is."""
        if trainer.world_size > 1 and lost_process(exception):
            exception.args = (f"{_LOST} (process {trainer.global_rank}: {exception})",)


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
