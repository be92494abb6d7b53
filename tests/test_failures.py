"""Every error is one line with an exit code of its kind; nothing that was not foreseen is lost."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ptq import PTQError, cli
from lightning_ptq.cli import main
from lightning_ptq.failures import exit_code, explained

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PTQError("x=3 is wrong. Use 4."), "x=3 is wrong. Use 4."),
        (OSError(errno.ENOSPC, "no space"), "the disk is full"),
        (FileNotFoundError(errno.ENOENT, "No such file", "gone.jpg"), "'gone.jpg': No such file, seen from"),
        (MisconfigurationException("no\n  loader"), "Lightning refuses this: no loader"),
        (torch.OutOfMemoryError("CUDA out of memory."), "Lower --model.batch_size"),
        (RuntimeError("[gloo] Connection closed by peer"), "Connection closed by peer"),
    ],
)
def test_what_was_foreseen_is_one_line_and_code_2(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(error) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-ptq: error: ")
    assert said in line


def test_what_was_not_is_one_line_and_a_file_with_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def bug() -> None:
        raise KeyError("banana")

    with pytest.raises(KeyError) as caught:
        bug()
    assert exit_code(caught.value) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError: 'banana'" in line
    assert "test_failures.py" in line
    kept = Path(re.findall(r"the traceback is in '(.+?)'", line)[0])
    assert "in bug" in kept.read_text()
    kept.unlink()
    assert explained(caught.value) is None


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-ptq", "fit", "--debug"])
    assert exit_code(PTQError("x=3")) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "PTQError: x=3" in first + last
    assert last == "lightning-ptq: error: x=3"


def interrupted_by_lightning() -> None:
    """As its Trainer ends a run at Ctrl-C."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def terminated() -> None:
    sys.exit(143)


def control_c() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("end", "code"), [(interrupted_by_lightning, 130), (control_c, 130), (terminated, 143)])
def test_a_run_that_is_told_to_stop_says_so_by_its_code(
    end: Callable[[], None], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        end()

    monkeypatch.setattr(cli, "PTQCLI", type("Ends", (), {"__init__": run, "subcommands": cli.PTQCLI.subcommands}))
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == code
    assert not capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(PTQError, match=r"accelerator='gpu': .*no GPU .* Take --trainer.accelerator cpu"):
        main(["fit", "--config=configs/quickstart.yaml", "--trainer.accelerator=gpu",
              f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = (
        "import lightning_ptq.cli as cli\n"
        "class Prints:\n"
        "    subcommands = cli.PTQCLI.subcommands\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        for _ in range(100_000): print('a line of the plan')\n"
        "cli.PTQCLI = Prints\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "a line of the plan\n"
    process.stdout.close()
    assert not process.stderr.read()
    assert process.wait(60) == 141
    process.stderr.close()
