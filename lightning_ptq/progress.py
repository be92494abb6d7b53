"""What a fit shows while it runs: bars by unit, or a line for each unit where there is no terminal."""

from __future__ import annotations

import time
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from rich.console import Console

from lightning_ptq.calibration import UnitReport

if TYPE_CHECKING:
    from lightning_ptq.module import PTQModule

# A step of the whole network, in steps of all units together: 0.8 for ResNet-20, 0.6 for ResNet-18, 0.5 where units
# have the contrastive term (docs/performance.md).
_NETWORK_STEP = 0.6


def can_draw() -> bool:
    """Whether standard output is a terminal that moves its cursor, or a notebook."""
    console = Console()
    if console.is_jupyter:
        return find_spec("ipywidgets") is not None  # rich draws with it, and warns without
    return console.is_terminal and not console.is_dumb_terminal


def unit_title(trainer: L.Trainer, unit: int | None = None) -> str:
    """ "unit k/K name" of an epoch, by default of the one in progress."""
    names = trainer.lightning_module.epoch_names
    unit = min(trainer.current_epoch if unit is None else unit, len(names) - 1)  # type: ignore[arg-type]
    return f"unit {unit + 1}/{len(names)} {names[unit]}"  # type: ignore[index,arg-type]


def current_terms(trainer: L.Trainer, metrics: dict[str, Any]) -> dict[str, Any]:
    """What of a bar's `metrics` says something: no version number, no term that was left behind by another epoch."""
    module: PTQModule = trainer.lightning_module  # type: ignore[assignment]
    objectives = [module.objective, module.network_objective]
    current = objectives.pop(trainer.current_epoch >= len(module.student)).terms
    (other,) = objectives
    stale = {"v_num", *other.terms} - set(current)
    return {key: value for key, value in metrics.items() if key not in stale}


def steps_left(trainer: L.Trainer, begins: bool = False) -> tuple[int, float]:
    """Batches that are left of the epoch in progress, and of all epochs after it, in batches of a unit.

    An epoch that `begins` has no pace yet: it counts as one after.
    """
    module: PTQModule = trainer.lightning_module  # type: ignore[assignment]
    limit, units, later = trainer.limit_train_batches, len(module.student), 0.0
    for epoch in range(trainer.current_epoch + (not begins), trainer.max_epochs or 0):
        steps = module.batches_of(epoch)
        steps = int(steps * limit) if isinstance(limit, float) else min(steps, limit)
        later += steps * units * _NETWORK_STEP if epoch == units else steps
    return 0 if begins else int(trainer.num_training_batches) - trainer.fit_loop.batch_idx - 1, later


class Pace:
    """How fast a fit is, by the clock since it started and since its unit did. Positions are the Trainer's."""

    def __init__(self) -> None:
        self.run = self.unit = (0.0, 0)  # (time, steps that were done) at the start
        self.now, self.steps = 0.0, 0  # the same, behind the last step of this fit in this process

    def begin_unit(self, now: float) -> None:
        """The unit's first step begins."""
        self.unit = (now, self.steps)
        if not self.steps:
            self.run = self.unit

    def step_done(self, now: float) -> None:
        """A step ends."""
        self.now, self.steps = now, self.steps + 1

    def seconds_per_step(self, since: tuple[float, int]) -> float:
        """Since that start; 0 before a step is done."""
        return (self.now - since[0]) / (self.steps - since[1]) if self.steps > since[1] else 0.0

    def left(self, unit_steps: int, later_steps: float) -> float:
        """Seconds that the unit's steps and those after it will take: its own pace, and that of the run so far."""
        return unit_steps * self.seconds_per_step(self.unit) + later_steps * self.seconds_per_step(self.run)


class _Units(ProgressBar):
    """What both bars share: pace and time left beside the terms; where nothing can be drawn, a line for each unit."""

    _pace, _told, _lines, _per_batch = Pace(), 0, False, 1.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Draw no bar into a log."""
        super().setup(trainer, pl_module, stage)
        self._lines = not can_draw() and trainer.is_global_zero
        if self._lines:
            self.disable()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing that an earlier process did is told again."""
        super().on_train_start(trainer, pl_module)
        self._pace, self._told = Pace(), len(pl_module.reports)  # type: ignore[arg-type]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the clock where a unit's steps begin."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0 or not self._pace.steps:
            self._tell(trainer, pl_module, begins=True)
            self._pace.begin_unit(time.monotonic())
            # Steps of a batch; the last may have fewer. Now: behind the last unit Lightning counts one epoch more.
            self._per_batch = pl_module.steps_taken() / int(trainer.num_training_batches)  # type: ignore[operator]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Look at it where a step ends."""
        self._pace.step_done(time.monotonic())
        super().on_train_batch_end(trainer, pl_module, *args)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell of the last unit."""
        self._tell(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The loss terms of the epoch in progress, images a second, and the time left for the whole run."""
        return self.pace(trainer) | current_terms(trainer, super().get_metrics(trainer, pl_module))

    def pace(self, trainer: L.Trainer, begins: bool = False) -> dict[str, str]:
        """Images a second of all processes, if steps read any, and the time left; `begins`: as in `steps_left`."""
        step = self._pace.seconds_per_step(self._pace.unit)
        if not step:
            return {}
        module: PTQModule = trainer.lightning_module  # type: ignore[assignment]
        images = module.batch_size * self._per_batch * trainer.world_size / step
        left = round(self._pace.left(*steps_left(trainer, begins)))
        speed = {"images/s": f"{images:.0f}"} if module.method.learns else {}  # without, a step reads none
        return speed | ({"left": str(timedelta(seconds=left))} if left else {})

    def _tell(self, trainer: L.Trainer, module: L.LightningModule, begins: bool = False) -> None:
        reports: list[UnitReport] = module.reports  # type: ignore[assignment]
        for unit in range(self._told, len(reports)) if self._lines else ():
            pace = ", ".join(f"{value} {name}" for name, value in self.pace(trainer, begins).items())
            print(f"{unit_title(trainer, unit)}: {unit_line(reports[unit])}{pace and f', {pace}'}", flush=True)  # noqa: T201
        self._told = len(reports)


def unit_line(report: UnitReport) -> str:
    """What became of a unit, in a few words."""
    if report.accepted and report.mse_before == report.mse_after:  # there was nothing to learn
        return f"rounded to nearest, error {report.mse_after:.3g}, {report.seconds:.1f} s"
    kept = "" if report.accepted else ", put back"
    return f"error {report.mse_before:.3g} -> {report.mse_after:.3g}{kept}, {report.seconds:.1f} s"


class UnitRichBar(_Units, RichProgressBar):
    """Lightning's rich bar with units in the place of epochs."""

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Without Lightning's time and speed, which are those of the unit, and with room for the terms."""
        title, bar, steps, *_ = super().configure_columns(trainer)
        bar.bar_width = 20
        return [title, bar, steps]

    def _get_train_description(self, current_epoch: int) -> str:
        return unit_title(self.trainer)

    def disable(self) -> None:
        """Draw no more: what is printed from here on comes behind the bar, in a pipe too."""
        super().disable()
        if self.progress is not None:
            self.progress.stop()


class UnitTQDMBar(_Units, TQDMProgressBar):
    """Lightning's tqdm bar with units in the place of epochs."""

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(unit_title(trainer))
