"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it.

    Whoever reads `path` never sees half of it, whenever this process dies or the disk is full. `write` may raise
    whatever it likes; the temporary file then goes.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # some writers look at the suffix
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
