"""A fit that is killed, told to stop or left without disk or company loses what it did since a checkpoint, no more."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from lightning_ptq import CalibrationDataModule, PTQError, PTQModule, interruptions
from lightning_ptq.checks import check_run_folder
from lightning_ptq.failures import explained
from lightning_ptq.files import write_whole
from tests.helpers import assert_equal_states, quantization_state, tiny_data, tiny_images, tiny_module, trainer

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    # Of torch's own process group and of Lightning's advice on forked processes.
    pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log.*sync_dist=True`"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
]


class At(Callback):
    """Calls a function behind a step, on one rank."""

    def __init__(self, step: int, call: Callable[[], object], rank: int = 0) -> None:
        self.step, self.call, self.rank = step, call, rank

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            self.call()


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """Python's own handler, also where a shell has started the tests in its background and so deaf to Ctrl+C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def assert_goes_on(folder: Path) -> None:
    """What lies in the folder leads to the parameters of a run that nothing happened to."""
    whole, resumed = tiny_module(), tiny_module()
    trainer(folder / "whole").fit(whole, datamodule=tiny_data())
    trainer(folder / "run").fit(resumed, datamodule=tiny_data(), ckpt_path=folder / "run" / "checkpoints" / "last.ckpt")
    assert_equal_states(quantization_state(resumed), quantization_state(whole))


def saved(folder: Path) -> dict[str, Any]:
    """The checkpoint in the folder, which is there alone."""
    (path,) = (folder / "checkpoints").iterdir()
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


# A parent that fitted may not fork any more, so forks come first.


@pytest.mark.forks
def test_sigterm_at_one_process_ends_both_at_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruptions, "_ASK_EVERY", 2)
    two = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    run = trainer(tmp_path / "run", callbacks=[At(9, terminate, rank=1)], **two)
    with pytest.raises(Exception, match="exit code 143"):
        run.fit(tiny_module(), datamodule=tiny_data())
    assert saved(tmp_path / "run")["global_step"] == 10
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trainer(tmp_path / "whole", **two).fit(tiny_module(), datamodule=tiny_data())
    trainer(tmp_path / "run", **two).fit(tiny_module(), datamodule=tiny_data(), ckpt_path=last)
    assert_equal_states(saved(tmp_path / "run")["state_dict"], saved(tmp_path / "whole")["state_dict"])


@pytest.mark.forks
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    folder, writes = tmp_path / "run" / "checkpoints", []

    def killed(path: Path, write: Callable[[Path], object]) -> None:
        def half(to: Path) -> None:
            write(to)
            if len(writes) == 3:
                os.truncate(to, to.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        writes.append(path)
        write_whole(path, half)

    child = os.fork()
    if child == 0:
        try:
            interruptions.write_whole = killed
            trainer(tmp_path / "run").fit(tiny_module(), datamodule=tiny_data())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (folder / ".last.tmp.ckpt").unlink()  # the half; no name that anything looks for
    assert len(saved(tmp_path / "run")["lightning_ptq"]["session"]["reports"]) == 2
    assert_goes_on(tmp_path)


def test_a_first_checkpoint_that_was_not_finished_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".last.tmp.ckpt").write_bytes(b"half")
    check_run_folder(trainer(tmp_path))
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"whole")
    with pytest.raises(PTQError, match="already holds a run"):
        check_run_folder(trainer(tmp_path))


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    limits, last = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "run" / "checkpoints" / "last.ckpt"

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (last.stat().st_size // 2, limits[1]))

    try:
        with pytest.raises(PTQError, match=r"last.ckpt' can't be written: File too large\. .*--ckpt_path last"):
            trainer(tmp_path / "run", callbacks=[At(14, fill)]).fit(tiny_module(), datamodule=tiny_data())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved(tmp_path / "run")["global_step"] == 12
    assert_goes_on(tmp_path)


def test_what_the_command_line_says_where_something_else_finds_the_disk_full() -> None:
    full = explained(OSError(errno.ENOSPC, "No space left on device", "metrics.csv"))
    assert "the disk is full: [Errno 28] No space left on device: 'metrics.csv'. Make room;" in str(full)
    assert explained(OSError(errno.EACCES, "Permission denied")) is None
    assert explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("step", [9, 12])  # in a unit, at the end of one
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_behind_a_checkpoint_of_the_step_with_the_shells_exit_code(
    tmp_path: Path, step: int, number: int, code: int
) -> None:
    before = signal.getsignal(number)
    tell = At(step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as exit_:
        trainer(tmp_path / "run", callbacks=[tell]).fit(tiny_module(), datamodule=tiny_data())
    assert exit_.value.code == code
    assert signal.getsignal(number) is before
    assert saved(tmp_path / "run")["global_step"] == step
    assert_goes_on(tmp_path)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reached = []

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("second")

    with pytest.raises(SystemExit) as exit_:
        trainer(tmp_path / "run", callbacks=[At(9, twice)]).fit(tiny_module(), datamodule=tiny_data())
    assert isinstance(exit_.value.__context__, KeyboardInterrupt), "as Lightning ends a run by itself"
    assert reached == ["first"]
    assert capfd.readouterr().err.count("Once more ends it at once.") == 1
    assert saved(tmp_path / "run")["global_step"] == 6, "of the unit before"


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_second_ctrl_c_does_not_tear_the_end_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave = PTQModule.leave_units

    def interrupted(module: PTQModule) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        leave(module)

    monkeypatch.setattr(PTQModule, "leave_units", interrupted)
    first = At(9, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as exit_:
        trainer(tmp_path, callbacks=[first]).fit(tiny_module(), datamodule=tiny_data())
    assert exit_.value.code == 130
    assert "not finished: 1 unit is done. Go on with" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("where", ["on_train_start", "on_validation_batch_start"])
def test_ctrl_c_ends_at_once_where_there_is_nothing_to_save(tmp_path: Path, where: str) -> None:
    reached = []

    def interrupt(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("behind")

    callback = Callback()
    setattr(callback, where, interrupt)
    with pytest.raises(SystemExit) as exit_:
        trainer(tmp_path / "run", callbacks=[callback]).fit(tiny_module(), datamodule=tiny_data())
    assert isinstance(exit_.value.__context__, KeyboardInterrupt)
    assert not reached


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("where", ["enter_unit", "leave_units"])
def test_ctrl_c_between_units_and_behind_the_last_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    called = getattr(PTQModule, where)
    sent, reached = list[str](), list[str]()

    def interrupted(module: PTQModule, *args: Any, **kwargs: Any) -> None:
        if module.reports and not sent:
            sent.append("once")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("behind")
        called(module, *args, **kwargs)

    monkeypatch.setattr(PTQModule, where, interrupted)
    data = CalibrationDataModule.from_loaders(DataLoader(tiny_images(64), batch_size=32))  # none to validate on
    with pytest.raises(SystemExit) as exit_:
        trainer(tmp_path / "run").fit(tiny_module(), datamodule=data)
    assert isinstance(exit_.value.__context__, KeyboardInterrupt)
    assert not reached


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_leaves_its_checkpoint_where_nobody_reads_any_more(tmp_path: Path) -> None:
    def interrupt() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        before = os.dup(2)
        os.dup2(writer, 2)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.dup2(before, 2)
            os.close(before)
            os.close(writer)

    with pytest.raises(SystemExit) as exit_:
        trainer(tmp_path, callbacks=[At(9, interrupt)]).fit(tiny_module(), datamodule=tiny_data())
    assert exit_.value.code == 130
    assert saved(tmp_path)["global_step"] == 9


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_worker_that_was_forked_is_deaf_to_ctrl_c(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    codes = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                os._exit(7)
            finally:
                os._exit(1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    trainer(tmp_path, callbacks=[At(9, fork)]).fit(tiny_module(), datamodule=tiny_data())
    assert codes == [7]
    assert "Once more" not in capfd.readouterr().err


def test_a_fit_that_ends_by_itself_leaves_lightnings_exception_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SIGTERMException, "code", "untouched")
    trainer(tmp_path).fit(tiny_module(), datamodule=tiny_data())
    assert SIGTERMException.code == "untouched"


def test_sigterm_ends_a_validation_without_a_fit(tmp_path: Path) -> None:
    seen = []

    class First(Callback):
        def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
            seen.append("batch")
            terminate()

    module = tiny_module()
    trainer(tmp_path / "fit").fit(module, datamodule=tiny_data())
    few = DataLoader(tiny_images(9), batch_size=3)
    with pytest.raises(SIGTERMException):
        trainer(tmp_path / "validate", callbacks=[First()]).validate(module, dataloaders=few, verbose=False)
    assert seen == ["batch"]


class Once(Callback):
    """Calls a function the first time that the Trainer is at a place, from the second unit on."""

    def __init__(self, where: str, call: Callable[[], object]) -> None:
        self.places = list[str]()

        def at(trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.current_epoch >= 1 and not trainer.sanity_checking:
                self.places.append(where)
                if len(self.places) == 1:
                    call()

        setattr(self, where, at)


@pytest.mark.parametrize(("accumulated", "step"), [(2, 4), (4, 3)])
def test_a_signal_between_two_batches_of_one_step_waits_for_the_step(
    tmp_path: Path, accumulated: int, step: int
) -> None:
    first, four = Once("on_train_batch_end", terminate), {"accumulate_grad_batches": accumulated}
    with pytest.raises(SystemExit):
        trainer(tmp_path / "run", callbacks=[first], **four).fit(tiny_module(), datamodule=tiny_data())
    assert saved(tmp_path / "run")["global_step"] == step, "one of the second unit"
    last, whole, resumed = tmp_path / "run" / "checkpoints" / "last.ckpt", tiny_module(), tiny_module()
    trainer(tmp_path / "whole", **four).fit(whole, datamodule=tiny_data())
    trainer(tmp_path / "run", **four).fit(resumed, datamodule=tiny_data(), ckpt_path=last)
    assert_equal_states(quantization_state(resumed), quantization_state(whole))


def test_a_signal_while_a_unit_is_judged_ends_behind_that_unit(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        trainer(tmp_path, callbacks=[Once("on_train_epoch_end", terminate)]).fit(tiny_module(), datamodule=tiny_data())
    assert exit_.value.code == 143
    assert saved(tmp_path)["global_step"] == 12


def test_a_signal_in_the_last_validation_ends_behind_its_batch(tmp_path: Path) -> None:
    first = Once("on_validation_batch_start", terminate)
    data = CalibrationDataModule.from_loaders(
        DataLoader(tiny_images(64), batch_size=32), DataLoader(tiny_images(9), batch_size=3)
    )
    fit, module = trainer(tmp_path, callbacks=[first]), tiny_module()
    with pytest.raises(SystemExit) as exit_:
        fit.fit(module, datamodule=data)
    assert exit_.value.code == 143
    assert len(first.places) == 1
    assert len(module.reports) == 5
    assert saved(tmp_path)["global_step"] == fit.global_step, "all steps"


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_validation_within_a_unit_loses_no_step(tmp_path: Path, number: int) -> None:
    first = Once("on_validation_batch_start", lambda: os.kill(os.getpid(), number))
    often = {"val_check_interval": 3, "check_val_every_n_epoch": 2}
    with pytest.raises(SystemExit):
        trainer(tmp_path, callbacks=[first], **often).fit(tiny_module(), datamodule=tiny_data())
    assert saved(tmp_path)["global_step"] == 10, "behind the step that follows the validation"


def test_a_handler_of_the_users_own_hears_ctrl_c(tmp_path: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        trainer(tmp_path / "run", callbacks=[At(9, lambda: os.kill(os.getpid(), signal.SIGINT))]).fit(
            tiny_module(), datamodule=tiny_data()
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [True]


def test_what_ended_a_run_decides_what_is_said_of_going_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(name: str, **how: Any) -> list[str]:
        with suppress(SystemExit):
            trainer(tmp_path / name, **how).fit(tiny_module(), datamodule=tiny_data())
        printed = capsys.readouterr().out.splitlines()
        assert printed[-1] == f"summary: {tmp_path / name / 'summary.json'}"
        return [line for line in printed[:-1] if line and not line.startswith("kept as")]

    def interrupt() -> None:
        raise KeyboardInterrupt

    def go_on(name: str) -> str:
        return f"Go on with ckpt_path={str(tmp_path / name / 'checkpoints' / 'last.ckpt')!r}"

    complete = said("complete")
    assert complete[-1] == f"checkpoint: {tmp_path / 'complete' / 'checkpoints' / 'last.ckpt'}"
    early = said("early", callbacks=[At(3, interrupt)])
    assert early == ["not finished: 0 units are done, and there is no last.ckpt yet: begin again."]
    later = said("later", callbacks=[At(9, interrupt)])
    assert later == [f"not finished: 1 unit is done. {go_on('later')}."], "no table, and nothing to lift"
    with monkeypatch.context() as patched:  # in the middle of the first checkpoint
        patched.setattr(L.Trainer, "save_checkpoint", lambda *_, **__: interrupt())
        unwritten = said("unwritten", callbacks=[])
    assert unwritten == ["not finished: 1 unit is done, and there is no last.ckpt yet: begin again."]
    away = L.pytorch.callbacks.ModelCheckpoint(dirpath="memory://run", save_last=True, every_n_train_steps=1)
    bucket = said("bucket", callbacks=[away, At(9, interrupt)])
    assert bucket == ["not finished: 1 unit is done. Go on with ckpt_path='memory://run/last.ckpt'."]
    terminated = said("terminated", callbacks=[At(14, terminate)])
    assert terminated == [f"not finished: 2 units are done. {go_on('terminated')}."]
    (limited,) = said("limited", max_steps=14)
    assert limited.startswith(
        f"not finished: 2 units are done. {go_on('limited')}, and lift what stopped it (max_steps"
    )


def test_sigterm_in_the_sanity_check_is_heard(tmp_path: Path) -> None:
    class Early(Callback):
        def on_sanity_check_end(self, *args: Any) -> None:
            terminate()

    with pytest.raises(SystemExit):
        trainer(tmp_path, callbacks=[Early()], num_sanity_val_steps=1).fit(tiny_module(), datamodule=tiny_data())
    assert saved(tmp_path)["global_step"] == 1


SCRIPT = """
import os, signal
from pathlib import Path

launched, how = os.environ.get("LOCAL_RANK") == "1", os.environ["HOW"]
if launched:
    Path(os.environ["PID"]).write_text(str(os.getpid()))
    if how == "before":
        os.kill(os.getppid(), signal.SIGKILL)  # the two have not met yet

import lightning as L
from lightning_ptq import cli

class End(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 12 and how == "killed" and launched:
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.global_step == 12 and how == "raised" and launched:
            raise MemoryError("no memory is left")

cli.PredictionFile = End
cli.main()
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("killed", "lightning-ptq: error: another process of this run has ended"),
        ("raised", "MemoryError: no memory is left"),
        ("before", "process 1 ends, since the one that started it did"),
    ],
)
def test_a_process_that_ends_takes_the_other_with_it(tmp_path: Path, how: str, said: str) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    start, told = time.monotonic(), {"HOW": how, "PID": str(tmp_path / "pid"), "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(
            [sys.executable, tmp_path / "run.py", "fit", "--config=configs/quickstart.yaml",
             "--model.steps_per_unit=10", "--data.init_args.calibration_samples=64", "--trainer.devices=2",
             "--trainer.strategy=ddp", f"--trainer.default_root_dir={tmp_path}"],
            env=os.environ | told | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, cwd=ROOT,
        )  # fmt: skip
        assert first.wait(timeout=300) != 0
    second = int((tmp_path / "pid").read_text())
    while _lives(second):
        assert time.monotonic() - start < 300
        time.sleep(0.1)
    assert said in (tmp_path / "log").read_text()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
