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
    counted = [name for name in start if "KiB" not in name]
    assert {name: end[name] for name in counted} == {name: start[name] for name in counted}
