"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lightning_ptq.errors import PTQError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it.

    Whoever reads `path` never sees half of it, whenever this process dies or the disk is full. `write` may raise
    whatever it likes; the temporary file then goes.

    Raises:
        PTQError: the disk is full, or does not take the file for another reason.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # some writers look at the suffix
    try:
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise PTQError(
            f"{str(path)!r} can't be written: {error.strerror or error}. What was there before is as it was. Make room "
            "for it, or choose another folder; a fit then goes on with --ckpt_path last."
        ) from error
