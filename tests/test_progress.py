"""What a fit shows: bars by unit, and lines where there is no terminal."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_ptq import progress
from lightning_ptq.calibration import UnitReport
from lightning_ptq.progress import Pace, UnitRichBar, UnitTQDMBar, can_draw, steps_left, unit_line
from tests.helpers import tiny_data, tiny_module, trainer


def test_the_tqdm_bar_names_unit_terms_and_pace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "can_draw", lambda: True)
    fit = trainer(tmp_path, enable_progress_bar=True, callbacks=[TQDMProgressBar(refresh_rate=1)])
    fit.fit(tiny_module(contrastive=True), datamodule=tiny_data())
    shown = capsys.readouterr()
    text = shown.out + shown.err
    for title in ("unit 1/5 stem", "unit 2/5 blocks.0", "unit 5/5 whole-network"):
        assert title in text
    for term in ("reconstruction=", "rounding=", "contrastive=", "images/s="):
        assert term in text
    assert type(fit.progress_bar_callback) is UnitTQDMBar


def test_the_rich_bar_names_units_terms_and_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "can_draw", lambda: True)
    titles, metrics = set(), set()

    class Spy(UnitRichBar):
        def _get_train_description(self, current_epoch: int) -> str:
            titles.add(super()._get_train_description(current_epoch))
            return super()._get_train_description(current_epoch)

        def get_metrics(self, *args: object) -> dict[str, object]:
            found = super().get_metrics(*args)  # type: ignore[arg-type]
            metrics.update(found)
            return found

    trainer(tmp_path, enable_progress_bar=True, callbacks=[Spy()]).fit(tiny_module(), datamodule=tiny_data())
    assert {"unit 1/5 stem", "unit 5/5 whole-network"} <= titles
    assert {"images/s", "reconstruction", "rounding", "prediction"} <= metrics


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_without_a_terminal_there_is_one_line_for_each_unit_and_no_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bar: type[RichProgressBar]
) -> None:
    assert not can_draw()
    fit = trainer(tmp_path, enable_progress_bar=True, callbacks=[bar()])
    module = tiny_module()
    fit.fit(module, datamodule=tiny_data())
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("unit ")]
    assert [re.findall(r"^unit (\d)/5 ([\w.-]+): error ", line) for line in lines] == [
        [(str(k + 1), name)] for k, name in enumerate(module.epoch_names)
    ]
    assert all("images/s" in line for line in lines)
    assert "━" not in out + err
    assert "%|" not in out + err


def test_the_last_unit_has_a_pace_without_a_last_epoch_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, enable_progress_bar=True).fit(tiny_module(network_steps=0), datamodule=tiny_data())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unit 4/4")]
    assert re.search(r", [1-9]\d* images/s", line)


def test_a_resumed_fit_tells_of_its_own_units_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path / "stopped", max_epochs=2).fit(tiny_module(), datamodule=tiny_data())
    capsys.readouterr()
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    resumed = trainer(tmp_path / "stopped", enable_progress_bar=True)
    resumed.fit(tiny_module(), datamodule=tiny_data(), ckpt_path=last)
    out = capsys.readouterr().out
    assert [line[:8] for line in out.splitlines() if line.startswith("unit ")] == ["unit 3/5", "unit 4/5", "unit 5/5"]


def test_the_time_left_is_that_of_the_units_pace_and_then_of_the_runs() -> None:
    pace = Pace()
    pace.begin_unit(100.0)
    for now in (101.0, 102.0):  # 1 s a step
        pace.step_done(now)
    assert pace.left(3, 10) == pytest.approx(13.0)
    pace.begin_unit(110.0)  # judged and advanced in the meantime
    pace.step_done(110.5)
    assert pace.seconds_per_step(pace.unit) == pytest.approx(0.5)
    assert pace.left(4, 6) == pytest.approx(4 * 0.5 + 6 * 10.5 / 3)


@pytest.mark.parametrize(("limit", "later"), [(1.0, 6 + 6 + 7.2), (0.5, 3 + 3 + 2.4), (4, 4 + 4 + 7.2)])
def test_steps_left_are_those_that_the_trainer_will_make(tmp_path: Path, limit: float, later: float) -> None:
    """One of the whole network goes through all four units, and counts as 2.4 of them."""
    found: list[tuple[int, float]] = []

    class Look(UnitRichBar):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # type: ignore[no-untyped-def]
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if trainer.current_epoch == 1 and batch_idx == 0:
                found.extend(steps_left(trainer, begins) for begins in (False, True))

    fit = trainer(tmp_path, enable_progress_bar=True, callbacks=[Look()], limit_train_batches=limit)
    fit.fit(tiny_module(network_steps=3), datamodule=tiny_data())
    steps = int(6 * limit) if isinstance(limit, float) else min(6, limit)
    assert found == [(steps - 1, pytest.approx(later)), (0, pytest.approx(steps + later))]


def test_the_last_epoch_counts_as_what_it_is_when_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that a second goes by at each look: one at every step, and one where a unit begins."""
    ticks = itertools.count()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    fit = trainer(tmp_path, enable_progress_bar=True)
    fit.fit(tiny_module(steps_per_unit=60, network_steps=60), datamodule=tiny_data())
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unit 4/5")]
    assert "0:02:26 left" in told[0], "60 steps, each 0.6 of what the 4 units' took: 144, where 240 took 243 seconds"


def test_what_learns_nothing_is_not_told_as_a_failure() -> None:
    same = UnitReport("conv1", 0.00247, 0.00247, 30.0, 1.0, 1.0, 0.1, -1.0, 0.0, True, 0.5)
    assert unit_line(same) == "rounded to nearest, error 0.00247, 0.5 s"
    assert unit_line(replace(same, accepted=False)) == "error 0.00247 -> 0.00247, put back, 0.5 s"
    assert unit_line(replace(same, mse_after=0.002)) == "error 0.00247 -> 0.002, 0.5 s"
