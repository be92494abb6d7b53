"""A file is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_ptq import PTQError
from lightning_ptq.files import write_whole


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    write_whole(path, lambda to: to.write_text(f"new {to.suffix}"))
    assert path.read_text() == "new .onnx"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(os, "fsync", lambda file: seen.append((os.pread(file, 9, 0).decode(), path.read_text())))
    write_whole(path, lambda to: to.write_text("new"))
    assert seen == [("new", "old")]
    assert path.read_text() == "new"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")

    def full(to: Path) -> None:
        to.write_text("half of")
        raise OSError(28, "No space left on device")

    with pytest.raises(PTQError, match=r"summary.json' can't be written: No space left .*--ckpt_path last"):
        write_whole(path, full)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
