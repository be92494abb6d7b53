"""What is lost when a run is killed, at moments spread over it, and what its one command makes of it afterwards.

    python -m benchmarks.kill --moments 50 --processes 1 2 --signals KILL TERM

A run is the quickstart with few steps, `lightning-ptq fit ... --ckpt_path last`. It is killed, the same command is
given again (a third of those are killed as well), until it is done; then its checkpoint is compared bit by bit with
that of a run that nobody killed. Moments are even in the time of that run behind its imports, each somewhere in its
share, and found in the killed run by what it was doing then. Others are aimed: into a half-written file, between
writing and renaming, behind it.

One process is forked from this one, which has imported everything already but never computes: PyTorch's pool of threads
does not outlive a fork ("Invalid thread pool!"). Two are started as from a terminal. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import multiprocessing.connection
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.common import commit
from lightning_ptq import callbacks, cli, interruptions, session, summary
from lightning_ptq.cli import main as terminal
from lightning_ptq.export import onnx, packed
from lightning_ptq.files import write_whole

with contextlib.suppress(ImportError):  # Lightning's logger would import it in every run
    import torch.utils.tensorboard

COLUMNS = (
    "commit", "command", "processes", "signal", "killed", "aim", "phase", "exit_code", "seconds_to_end", "steps_done",
    "steps_saved", "kills", "equal", "complete", "validated", "leftovers",
)  # fmt: skip
POINTS = ("half", "written", "renamed")
# Checkpoints within a unit, which has 1000 steps between two in earnest; questions whether to stop, 20 in earnest.
INTERVAL, ASK_EVERY = 8, 5
# Longer than this after a kill, no process of a run may live.
LIMIT = 60.0
FIT = (
    "fit", "--config=configs/quickstart.yaml", "--model.steps_per_unit=20", "--data.init_args.calibration_samples=128",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--trainer.callbacks+=benchmarks.kill.Marks", "--ckpt_path=last",
)  # fmt: skip


# ---- in the run that is killed ----


class Marks(L.Callback):
    """Writes down what the run is doing and, where it is aimed at, ends it."""

    def __init__(self) -> None:
        callbacks._LONG_UNIT, interruptions._ASK_EVERY = INTERVAL, ASK_EVERY
        self.rank = os.environ.get("LOCAL_RANK", "0")
        self.file = os.open(os.environ["KILL_MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.writes = count(1)
        os.write(self.file, f"{time.monotonic()} pid {self.rank} {os.getpid()}\n".encode())
        self.mark("start")
        session.estimate_ranges = self.marked("ranges", session.estimate_ranges)
        session.Session.enter = self.marked("caching", session.Session.enter)
        session.Session.finish = self.marked("judging", session.Session.finish)
        for module in (interruptions, summary, cli, onnx, packed):
            module.write_whole = self.write_whole

    def mark(self, name: str) -> None:
        """Of the first process; the others do the same."""
        if self.rank == "0":
            os.write(self.file, f"{time.monotonic()} {name}\n".encode())

    def marked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which writes down that it begins."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.mark(name)
            return function(*args, **kwargs)

        return call

    def write_whole(self, path: Path, write: Callable[[Path], object]) -> None:
        """The package's own, which a signal ends where it is aimed at."""
        number, point, name = os.environ.get("KILL_AIM", "0:none:KILL").split(":")
        aimed = next(self.writes) == int(number)

        def end(here: str) -> None:
            if aimed and here == point:
                os.kill(os.getpid(), signal.Signals[f"SIG{name}"])

        def written(to: Path) -> None:
            write(to)
            if aimed and point == "half" and name == "KILL":  # after SIGTERM the run writes on
                os.truncate(to, to.stat().st_size // 2)
            end("half")
            end("written")

        self.mark(f"writing {path.name}")
        write_whole(path, written)
        end("renamed")
        self.mark("written")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.mark("setup")

    def on_train_batch_start(self, *args: Any) -> None:
        self.mark("steps")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.mark(f"step {trainer.global_step}")

    def on_validation_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.mark("validation")

    def on_fit_end(self, *args: Any) -> None:
        self.mark("end of fit")


# ---- here ----


class Forked:
    """The terminal's entry point in a copy of this process; as much of `subprocess.Popen` as is used."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(file, 1)
                os.dup2(file, 2)
                os.environ.update(environment)
                tempfile.tempdir, sys.argv = None, ["lightning-ptq", *arguments]
                torch.set_num_threads(1)
                terminal()
                code = 0
            except SystemExit as exit_:
                code = exit_.code if isinstance(exit_.code, int) else 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """Exit code, negative for a signal, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


class Attempt:
    """One command, from its start to the end of its last process."""

    def __init__(self, arguments: list[str], folder: Path, processes: int, aim: str = "") -> None:
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        self.marks_file, self.processes = folder / "marks", processes
        self.marks_file.unlink(missing_ok=True)
        environment = {"KILL_MARKS": str(self.marks_file), "KILL_AIM": aim or "0:none:KILL", "OMP_NUM_THREADS": "1"}
        environment["TMPDIR"] = str(folder / "tmp")
        self.began = time.monotonic()
        self.process: Forked | subprocess.Popen[bytes]
        if processes == 1:
            self.process = Forked(arguments, environment, folder / "log")
        else:
            with (folder / "log").open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "lightning_ptq", *arguments],
                    env=os.environ | environment, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip

    def lines(self) -> list[list[str]]:
        """What the run wrote down so far, in words; a line that is being written has no end yet."""
        text = self.marks_file.read_text() if self.marks_file.exists() else ""
        return [line.split() for line in text.split("\n")[:-1] if line]

    def marks(self) -> list[tuple[float, str]]:
        """Seconds since the start and what began then."""
        return [(float(at) - self.began, " ".join(name)) for at, *name in self.lines() if name[0] != "pid"]

    def phase(self) -> str:
        """What it was doing last."""
        name = next((name for _, name in reversed(self.marks())), "import")
        return "steps" if name.startswith("step") else name

    def step(self) -> int:
        """Steps done, from the beginning of the calibration; 0 if this attempt did none."""
        return max((int(name.split()[1]) for _, name in self.marks() if name.startswith("step ")), default=0)

    def kill(self, number: signal.Signals, whom: str) -> None:
        """Send a signal to the `first` process, the `second` or to `all`."""
        if whom == "all":
            os.killpg(self.process.pid, number)
            return
        pids = {"0": self.process.pid}
        pids |= {words[2]: int(words[3]) for words in self.lines() if words[1] == "pid"}
        os.kill(pids.get("1" if whom == "second" else "0", self.process.pid), number)

    def wait(self, limit: float) -> float:
        """Seconds until no process is left, `limit` at most; then what is left is killed."""
        start = time.monotonic()
        while time.monotonic() - start < limit:
            if self.process.poll() is not None and not list(members(self.process.pid)):
                break
            time.sleep(0.02)
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
            while self.process.poll() is None:
                time.sleep(0.02)
        return time.monotonic() - start


def members(group: int) -> Iterator[int]:
    """Living processes of a process group."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, found = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:  # gone meanwhile
            continue
        if int(found) == group and state not in "ZX":
            yield int(stat.parent.name)


def read_newest(folder: Path, told: multiprocessing.connection.Connection) -> None:
    """What `newest` returns."""
    steps, digest = 0, hashlib.sha256()
    for path in sorted(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime):
        read = torch.load(path, weights_only=True)
        steps, digest = read["global_step"], hashlib.sha256()
        for name, tensor in sorted(read["state_dict"].items()):
            if not name.startswith("rates."):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    told.send((steps, digest.hexdigest()))


def newest(folder: Path) -> tuple[int, str]:
    """Steps and hash of the parameters of the checkpoint that a run would go on from; every other has to be readable.

    Read by a process of its own, so that this one can be forked.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    reader = context.Process(target=read_newest, args=(folder, there))
    reader.start()
    there.close()
    try:
        return here.recv()  # type: ignore[no-any-return]
    except EOFError:
        raise RuntimeError(f"a checkpoint below {folder} can't be read") from None
    finally:
        reader.join()
        here.close()


def arguments_of(folder: Path, processes: int) -> list[str]:
    """Of the one command that begins and goes on."""
    several = ["--trainer.devices=2", "--trainer.strategy=ddp"] if processes > 1 else []
    return [*FIT, f"--trainer.default_root_dir={folder / 'run'}", *several]


def survive(
    folder: Path, whole: Attempt, expected: str, name: str, moment: float, whom: str, aim: str,
    draw: random.Random,
) -> dict[str, Any]:  # fmt: skip
    """Kill a run at a moment, or where it is aimed at, go on until it is done, and compare."""
    processes, marks, number = whole.processes, whole.marks(), signal.Signals[f"SIG{name}"]
    arguments = arguments_of(folder, processes)
    attempt = Attempt(arguments, folder, processes, f"{aim}:{name}" if aim else "")
    if aim:
        attempt.wait(10 * LIMIT)
    else:
        passed = [mark for mark in marks if mark[0] <= moment]
        while attempt.process.poll() is None and len(attempt.marks()) < len(passed):
            time.sleep(0.002)
        time.sleep(moment - passed[-1][0] if passed else moment)
    phase = attempt.phase()
    if not aim and attempt.process.poll() is None:
        attempt.kill(number, whom)
    seconds, done = attempt.wait(LIMIT), attempt.step()
    code, kills = attempt.process.poll(), 1
    saved, _ = newest(folder / "run")
    for _ in range(4):
        attempt = Attempt(arguments, folder, processes)
        if kills < 3 and draw.random() < 1 / 3:
            time.sleep(draw.random() * marks[-1][0])
            if attempt.process.poll() is None:
                attempt.kill(number, whom)
                kills += 1
        attempt.wait(10 * LIMIT)
        if attempt.process.poll() == 0:
            break
    _, found = newest(folder / "run")
    told = [path.read_text() for path in (folder / "run").rglob("summary.json")]
    left = [path for path in (folder / "run").rglob(".*") if path.is_file()] + list((folder / "tmp").iterdir())
    return {
        "command": "fit", "processes": processes, "signal": name, "killed": whom, "aim": aim, "phase": phase,
        "exit_code": code, "seconds_to_end": round(seconds, 1), "steps_done": done, "steps_saved": saved,
        "kills": kills,
        "equal": found == expected,
        "complete": any('"complete": true' in text for text in told),
        "validated": any('"student_top1": null' not in text for text in told),
        "leftovers": " ".join(path.name for path in left),
    }  # fmt: skip


def survive_export(folder: Path, checkpoint: Path, kind: str, name: str, point: str) -> dict[str, Any]:
    """End an export in the middle of its file, give the command again, and compare with an undisturbed one's file."""
    output = folder / f"model.{kind}"
    arguments = ["export", *FIT[1:-1], f"--ckpt_path={checkpoint}", f"--output={output}", "--overwrite=true"]
    Attempt(arguments, folder, 1).wait(10 * LIMIT)
    expected = output.read_bytes()
    whole, codes = [], []
    for aim in (f"1:{point}:{name}", ""):
        attempt = Attempt(arguments, folder, 1, aim)
        attempt.wait(10 * LIMIT)
        codes.append(attempt.process.poll())
        whole.append(output.read_bytes() == expected)
    left = [path for path in folder.glob(".*") if path.is_file()]
    return {
        "command": f"export .{kind}", "processes": 1, "signal": name, "killed": "all", "aim": f"1:{point}",
        "phase": f"writing model.{kind}", "exit_code": codes[0], "seconds_to_end": 0.0, "kills": 1,
        "equal": all(whole), "complete": codes[1] == 0,
        "leftovers": " ".join(path.name for path in left),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Rows by what the run was doing, as Markdown."""
    lines = [
        "| processes | signal | while it was | killed | bit-equal | steps repeated | ended within s | left files |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["processes"], row["signal"], row["phase"]), []).append(row)
    for key, group in sorted(groups.items(), key=lambda item: tuple(map(str, item[0]))):
        repeated = max(max(0, int(row.get("steps_done") or 0) - int(row.get("steps_saved") or 0)) for row in group)
        slowest, left = max(float(row["seconds_to_end"]) for row in group), sum(bool(row["leftovers"]) for row in group)
        equal = sum(str(row["equal"]) == "True" for row in group)
        cells = (*key, len(group), equal, repeated, slowest, left)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50, help="for each number of processes and each signal")
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--signals", nargs="+", choices=("KILL", "TERM"), default=["KILL", "TERM"])
    parser.add_argument("--aimed", nargs="*", type=int, default=[1, 2, 5, 20, 21], help="numbers of files to aim at")
    parser.add_argument("--exports", nargs="*", choices=("ptq", "onnx"), default=["ptq", "onnx"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"), help="rows are added to it")
    args = parser.parse_args()
    scratch, version, rows = Path(tempfile.mkdtemp(prefix="kill-")), commit(), []

    def keep(row: dict[str, Any], folder: Path) -> None:
        rows.append({"commit": version} | row)
        new = not args.out.exists()
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(rows[-1])
        print(", ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
        if row["equal"] and row["complete"]:
            shutil.rmtree(folder)
        else:
            print(f"see {folder}", flush=True)

    for processes in args.processes:
        folder = scratch / f"whole-{processes}"
        whole = Attempt(arguments_of(folder, processes), folder, processes)
        whole.wait(10 * LIMIT)
        if whole.process.poll() != 0:
            sys.exit(f"the run that nobody kills failed: see {folder / 'log'}")
        _, expected = newest(folder / "run")
        first, last = whole.marks()[0][0], whole.marks()[-1][0]
        print(f"{processes} processes: {whole.step()} steps, {last:.1f} s, {first:.1f} of them imports", flush=True)
        for name in args.signals:
            draw = random.Random(f"{args.seed} {processes} {name}")
            whoms = ["first"] if processes == 1 else ["first", "all", *(["second"] if name == "KILL" else [])]
            moments = [(first + (last - first) * (i + draw.random()) / args.moments, "") for i in range(args.moments)]
            aims = [(0.0, f"{write}:{point}") for write in args.aimed for point in POINTS]
            for i, (moment, aim) in enumerate(moments + aims):
                at = scratch / f"{processes}-{name}-{i}"
                keep(survive(at, whole, expected, name, moment, whoms[i % len(whoms)], aim, draw), at)
        if processes == 1:
            (checkpoint,) = (folder / "run").rglob("last.ckpt")
            for kind in args.exports:
                for name in args.signals:
                    for point in POINTS:
                        at = scratch / f"{kind}-{name}-{point}"
                        keep(survive_export(at, checkpoint, kind, name, point), at)
    print(table(rows))
    lost = sum(not (row["equal"] and row["complete"]) for row in rows)
    if not lost:
        shutil.rmtree(scratch)
    print(f"{len(rows)} killed, {lost} lost, {sum(float(row['seconds_to_end']) >= LIMIT for row in rows)} hung")


if __name__ == "__main__":
    main()
