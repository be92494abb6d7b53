"""What is known when a fit ends: the content of `summary.json`, and the table teacher / nearest / calibrated."""

from __future__ import annotations

import json
import os
import resource
import shlex
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_ptq.checks import check_run_folder, run_folder
from lightning_ptq.datasets import class_names
from lightning_ptq.files import write_whole
from lightning_ptq.fingerprint import environment
from lightning_ptq.front import finite
from lightning_ptq.interruptions import LAUNCHER
from lightning_ptq.metrics import MEASURES
from lightning_ptq.network import NETWORK
from lightning_ptq.record import confusion, plain, record
from lightning_ptq.report import write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_ptq.module import PTQModule

# What the table may show of a network.
_SHOWN = ("top1", "agreement", "miou", "sqnr_db")
# What of the Trainer, beside its precision and processes, decides how calibration proceeds.
_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "limit_train_batches", "max_steps")


class RunSummary(Callback):
    """Writes `summary.json` to the run folder and prints the table teacher / nearest / calibrated."""

    def __init__(self) -> None:
        # Of the last validation, and the epoch that it followed; a resumed fit may have none of its own.
        self.metrics: dict[str, float] = {}
        self.confusions: dict[str, Any] = {}
        self.epoch = -1

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "confusions": self.confusions, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics, self.epoch = state_dict["metrics"], state_dict["epoch"]
        self.confusions = state_dict.get("confusions", {})  # an older checkpoint has none

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what was measured."""
        if not trainer.sanity_checking:
            self.epoch = min(trainer.current_epoch, len(pl_module.epoch_names) - 1)  # type: ignore[arg-type]
            self.metrics = {
                key: float(trainer.callback_metrics[key]) for key in MEASURES if key in trainer.callback_metrics
            }
            self.confusions = confusions(trainer, pl_module)  # type: ignore[arg-type]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a folder that holds another run; only now Lightning tells whether a checkpoint is continued."""
        check_run_folder(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the student as it would be used, also after an interrupt, and what is known where a run was told to
        end: by SIGTERM, at which all processes are at the same step, or by Ctrl+C."""
        pl_module.leave_units()  # type: ignore[operator]
        told = isinstance(exception, SIGTERMException)
        told |= isinstance(exception, KeyboardInterrupt) and trainer.world_size == 1
        if told and trainer.state.fn == TrainerFn.FITTING and pl_module.session.image_digest is not None:  # type: ignore[union-attr]
            self._leave(trainer, pl_module, told=True)  # type: ignore[arg-type]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate a network that was killed in its validation: resumed, Lightning takes the last epoch for done."""
        every, done, loop = trainer.check_val_every_n_epoch, trainer.current_epoch, trainer.fit_loop.epoch_loop.val_loop
        finished = done == len(pl_module.epoch_names) and every is not None and done % every == 0  # type: ignore[arg-type]
        if finished and trainer.enable_validation and self.epoch < done - 1:
            trainer.validating, loop.restarting = True, False
            loop.run()
            trainer.training = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and print; rank 0 only."""
        module: PTQModule = pl_module  # type: ignore[assignment]
        module.judge_last_unit()
        self._leave(trainer, module)

    def _leave(self, trainer: L.Trainer, module: PTQModule, told: bool = False) -> None:
        """Summary, record, table and report; `told`: the run was told to end. A collective call."""
        folder = run_folder(trainer)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # Not the module's device: where a fit ends, Lightning has moved that to the CPU, which NCCL does not reduce.
        device = trainer.strategy.root_device
        unread = torch.tensor(trainer.datamodule.unread_images, device=device)  # type: ignore[attr-defined]
        skipped = trainer.strategy.reduce(unread, reduce_op="sum").tolist()
        if trainer.is_global_zero:
            self._write(trainer, module, folder, skipped, told)
        trainer.strategy.barrier()  # who loses one process ends the others: none leaves before the report is drawn

    def _write(self, trainer: L.Trainer, module: PTQModule, folder: Path, skipped: list[int], told: bool) -> None:
        module.stop_clock()
        # What was measured before the last epoch says nothing about the network as it is now.
        measured = self.epoch == trainer.current_epoch - 1
        summary = summarize(module, trainer, self.metrics if measured else {})
        summary["skipped_images"] = dict(zip(("calibration", "validation"), skipped, strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "summary.json", summary)
        bar = trainer.progress_bar_callback
        if bar is not None:
            bar.disable()  # a live bar would be drawn over the result
        lines = [table(summary)]
        if not summary["complete"]:
            lines.append(to_go_on(trainer, len(module.reports), told))
        elif path := own_checkpoint(trainer):
            lines.append(f"checkpoint: {path}")
        print(*lines, f"summary: {folder / 'summary.json'}", sep="\n", flush=True)  # noqa: T201 (the result)
        report(trainer, module, folder, self.confusions if measured else {})


def report(trainer: L.Trainer, module: PTQModule, folder: Path, confusions: dict[str, Any]) -> None:
    """Write `record.json` and draw the report of the run in `folder`. What goes wrong is a warning: the run is safe."""
    session = module.session
    again = f"lightning-ptq report {shlex.quote(str(folder))}"
    try:
        found = record(module.chains, module.epoch_names, session.seen, session.curves, confusions)
        write_json(folder / "record.json", plain(found), indent=None)
        if module.draws_report:
            page = write_report([folder], show=lambda *drawn: show_figure(trainer, *drawn))
            print(f"report: {page}", flush=True)  # noqa: T201 (the result)
    except Exception as error:
        message = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        warnings.warn(f"the report could not be drawn: {message}. The run is whole; try again: {again}", stacklevel=2)


def show_figure(trainer: L.Trainer, name: str, figure: Figure, file: Path) -> None:
    """Give a figure to the loggers that take some; one that fails goes without."""
    for logger in trainer.loggers:
        with suppress(Exception):  # whatever a logger's own library raises
            own = getattr(logger, "experiment", None)
            takers: tuple[tuple[Any, str, tuple[Any, ...]], ...] = (
                (own, "add_figure", (f"report/{name}", figure, trainer.global_step)),  # TensorBoard
                (logger, "log_image", (f"report/{name}", [str(file)])),  # Weights & Biases
                (own, "log_artifact", (getattr(logger, "run_id", None), str(file), "report")),  # MLflow
            )
            for owner, method, arguments in takers:
                if callable(take := getattr(owner, method, None)):
                    take(*arguments)
                    break


def confusions(trainer: L.Trainer, module: PTQModule) -> dict[str, Any]:
    """`confusion` of each network over the validation images of all processes. A collective call."""
    mine = {name: torch.cat(pairs).cpu() for name, pairs in module.class_pairs.items()}
    every, counts = [mine], [module.class_count]
    if trainer.world_size > 1:
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, (mine, module.class_count))
        every, counts = [pairs for pairs, _ in gathered], [count for _, count in gathered]
    names = dict.fromkeys(name for pairs in every for name in pairs)
    codes = {name: torch.cat([pairs[name] for pairs in every if name in pairs]) for name in names}
    called = class_names(trainer.val_dataloaders)
    return {name: confusion(found, max(counts), called) for name, found in codes.items()}


def summarize(module: PTQModule, trainer: L.Trainer, metrics: dict[str, float]) -> dict[str, Any]:
    """The content of `summary.json`; `metrics` are the rates of the last validation."""
    samples = trainer.datamodule.calibration_samples  # type: ignore[attr-defined]
    device = trainer.strategy.root_device  # the module has left it by then
    return {
        "model": module.model_name,
        "part": None if module.surroundings is None else module.surroundings.part,
        "method": module.method_name,
        "contrastive": module.contrastive,
        "corrected_biases": module.method.corrects_biases,
        "weight_bits": module.quant.weight_bits,
        "act_bits": module.quant.act_bits,
        "average_bits": module.quant.average_bits,
        "budget": module.quant.budget,
        "bits": module.session.bits,
        "norms": module.quant.norms,
        "pairs": module.quant.pairs,
        "softmax": module.quant.softmax,
        "edges": module.quant.edges,
        "placement": module.quant.placement,
        "granularity": module.method.granularity,
        "seed": module.seed,
        "calibration_samples": samples if module.session.image_count is None else module.session.image_count,
        "judging_samples": module.session.judge_count,
        "images_available": trainer.datamodule.images_available,  # type: ignore[attr-defined]
        "steps_per_unit": module.steps_per_unit,
        "network_steps": module.network_steps,
        "complete": len(module.reports) == len(module.epoch_names),
        # False: all of it is as it started, since each part or the whole did worse.
        "accepted": any(report.accepted for report in module.reports),
        # Not finite: top-1 where no label counts, and the ratio where nothing differs.
        **{key: finite(metrics.get(key)) for key in MEASURES if key.endswith(("top1", "miou", "sqnr_db"))},
        "teacher_agreement": metrics.get("student_agreement"),
        "nearest_agreement": metrics.get("nearest_agreement"),
        "calibration_agreement": module.session.calibration_agreement,
        "overfit_gap": overfit_gap(module.session.calibration_agreement, metrics.get("student_agreement")),
        "wall_seconds": {key: round(value, 3) for key, value in module.session.wall_seconds.items()},
        "settings": module.settings(),
        "quant": module.quant.to_dict(),
        "trainer": {key: getattr(trainer, key) for key in _TRAINER},
        "digests": {"model": module.model_digest, "images": module.session.image_digest},
        "environment": environment(device),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        # JSON has no infinity: an SQNR without noise, or of a constant output, is null.
        "units": [
            {key: finite(value) for key, value in unit.items()}
            for unit in (report.to_dict() for report in module.reports)
        ],
    }


def overfit_gap(calibration: float | None, validation: float | None) -> float | None:
    """How many points more often the student agrees with the teacher on what it was calibrated with than elsewhere."""
    return None if calibration is None or validation is None else calibration - validation


def method_title(summary: dict[str, Any]) -> str:
    """What was done to the student."""
    if summary["contrastive"]:
        return f"{summary['method']} + contrastive"
    return "nearest + corrected biases" if summary["corrected_biases"] else str(summary["method"])


def own_checkpoint(trainer: L.Trainer) -> str | None:
    """Path of the `last.ckpt` that this fit left; None without one."""
    callbacks = trainer.checkpoint_callbacks
    saved = (getattr(callback, "last_model_path", "") for callback in callbacks)  # one on exceptions has none
    # Lightning names a file before it is written, which an interrupt may have prevented; one that lies elsewhere, such
    # as in a bucket, is not looked for.
    return next((path for path in saved if path and ("://" in path or Path(path).exists())), None)


def to_go_on(trainer: L.Trainer, done: int, told: bool) -> str:
    """Where a run that was stopped stands, and how to go on: by a limit of its own, or because it was `told` to end."""
    path = own_checkpoint(trainer) or trainer.ckpt_path
    stands = f"not finished: {'1 unit is' if done == 1 else f'{done} units are'} done"
    if path is None:
        return f"{stands}, and there is no last.ckpt yet: begin again."
    limit = "" if told else ", and lift what stopped it (max_steps, max_epochs, max_time)"
    terminal = f"--ckpt_path {shlex.quote(str(path))} (or last)"
    return f"{stands}. Go on with {terminal if LAUNCHER in os.environ else f'ckpt_path={str(path)!r}'}{limit}."


def table(summary: dict[str, Any]) -> str:
    """The result as text: one row each for teacher, round-to-nearest and calibrated student."""

    def cell(value: float | None) -> str:
        return f"{value:9.2f}" if value is not None else "        -"

    average = summary.get("average_bits")
    bits = f"W{summary['weight_bits']}A{summary['act_bits']}" if average is None else f"{average:g} bits on average"
    rows = [
        ("teacher, float32", summary["teacher_top1"], 100.0 if summary["teacher_agreement"] is not None else None),
        (f"nearest, {bits}", summary["nearest_top1"], summary["nearest_agreement"]),
        (f"{method_title(summary)}, {bits}", summary["student_top1"], summary["teacher_agreement"]),
    ]  # fmt: skip
    networks = ["teacher", "nearest", "student"]
    if method_title(summary) == "nearest":  # calibrated it is the same, but for what biases are rounded to
        del rows[1], networks[1]
    width = max(len(name) for name, *_ in rows)
    lines = []
    if any(summary.get(f"{network}_{measure}") is not None for network in ("teacher", "student") for measure in _SHOWN):
        lines.append(f"{'':{width}} {'top-1 %':>9} {'agreement with the teacher %':>30}")
        lines += [f"{name:{width}} {cell(top1)} {cell(agreement):>30}" for name, top1, agreement in rows]
    elif summary["complete"]:
        agreed = summary["calibration_agreement"]
        known = "" if agreed is None else f"; on those of calibration {agreed:.2f} % agreement with the teacher"
        lines.append(f"no validation images were read{known}")
    names = [name for name, *_ in rows]
    for measure, title in (("miou", "mIoU %"), ("sqnr_db", "output SQNR dB")):
        # Of dense outputs, and where there are no classes to agree on.
        values = [summary.get(f"{network}_{measure}") for network in networks]
        shown = any(value is not None for value in values)
        if shown and (measure == "miou" or summary["teacher_agreement"] is None):
            lines.append(f"{'':{width}} {title:>14}")
            lines += [f"{name:{width}} {cell(value):>14}" for name, value in zip(names, values, strict=True)]
    rolled_back = [unit["name"] for unit in summary["units"] if not unit["accepted"]]
    units = [name for name in rolled_back if name != NETWORK]
    kept = "kept as rounded to nearest, since calibration did not improve"
    if summary["complete"] and rolled_back and len(rolled_back) == len(summary["units"]):
        return "\n".join(["", *lines, f"{kept} it: the whole network"])
    if units:
        lines.append(f"{kept} them: {', '.join(map(repr, units))}")
    if NETWORK in rolled_back:
        lines.append("kept as the units left it, since the last epoch made its predictions worse: the whole network")
    return "\n".join(["", *lines])


def write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write plain values; a reader never sees half a file."""
    text = json.dumps(content, indent=indent, allow_nan=False)
    write_whole(path, lambda to: to.write_text(f"{text}\n"))


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
