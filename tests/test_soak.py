"""Several calibrations in one process leave nothing behind: the short form of `benchmarks/soak.py`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.soak import soak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nothing_piles_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    start, end = soak(4, warm_up=2)
    # Of memory a few runs tell nothing.
    grown = {name: (start[name], end[name]) for name in start if "KiB" not in name and end[name] > start[name]}
    assert not grown  # fewer is no leak: tests before this one may have left threads that end meanwhile
