"""What the command line says of an error, and the exit code that it ends with."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from pathlib import Path
from signal import SIGINT, SIGTERM

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ptq.errors import PTQError
from lightning_ptq.help import NO_READER
from lightning_ptq.interruptions import lost_process

WRONG_INPUT, UNFORESEEN = 2, 3
INTERRUPTED = 128 + SIGINT
# Codes of processes that were told to end, all of them at the same step.
TOLD = (INTERRUPTED, 128 + SIGTERM)


def explained(error: BaseException) -> PTQError | None:
    """What can be said of an error in one sentence, if anything: what is wrong and the way out."""
    # jsonargparse wraps what a datamodule refuses: `data` is optional, so a union for it.
    for candidate in (error, error.__cause__):
        if isinstance(candidate, PTQError):
            return candidate
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # a logger's file, say
        return PTQError(f"the disk is full: {error}. Make room; a fit then goes on with --ckpt_path last.")
    if isinstance(error, OSError) and error.filename is not None:
        return PTQError(f"{error.filename!r}: {error.strerror}, seen from {str(Path.cwd())!r}. Give another path.")
    if isinstance(error, MisconfigurationException):
        return PTQError(f"Lightning refuses this: {_line(error)}")
    if isinstance(error, torch.OutOfMemoryError):
        return PTQError(
            f"the GPU's memory is full: {_line(error)} Lower --model.batch_size, or keep activations elsewhere with "
            "--model.cache host. A fit then goes on with --ckpt_path last."
        )
    return PTQError(str(error)) if lost_process(error) else None


def exit_code(error: BaseException) -> int:
    """Say what is wrong on one line of stderr, and give the exit code. With --debug the traceback comes first."""
    if isinstance(error, SystemExit):
        # Lightning ends a run at Ctrl-C with code 1.
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        return INTERRUPTED if isinstance(error.__context__, KeyboardInterrupt) else code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return NO_READER
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    told = explained(error)
    if told is not None:
        print(f"lightning-ptq: error: {told}", file=sys.stderr)
        return WRONG_INPUT
    last = traceback.extract_tb(error.__traceback__)[-1]
    with tempfile.NamedTemporaryFile("w", prefix="lightning-ptq-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    print(
        f"lightning-ptq: error: {type(error).__name__}: {_line(error)} ({last.filename}:{last.lineno}). This was not "
        f"foreseen; the traceback is in {file.name!r}, and --debug shows it.",
        file=sys.stderr,
    )
    return UNFORESEEN


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _nobody_reads() -> bool:
    """Whether what reads this program's output is gone; it then writes to nowhere, also while Python ends."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
