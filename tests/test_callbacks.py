"""What a fit leaves: checkpoints, the summary's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, RichProgressBar

from lightning_ptq.callbacks import StepCheckpoint, UnitCheckpoint
from lightning_ptq.summary import RunSummary, table, write_json
from tests.helpers import tiny_data, tiny_module, trainer


def test_defaults_are_replaced_and_the_users_callbacks_stay(tmp_path: Path) -> None:
    fit = trainer(tmp_path, enable_progress_bar=True, callbacks=[RichProgressBar()])
    fit.fit(tiny_module(), datamodule=tiny_data())
    kinds = {type(callback) for callback in fit.callbacks}
    assert {RunSummary, UnitCheckpoint} <= kinds
    assert ModelCheckpoint not in kinds
    assert StepCheckpoint not in kinds, "units of a few steps need none in their middle"

    mine = ModelCheckpoint(tmp_path / "mine", every_n_train_steps=5, save_top_k=-1)
    fit = trainer(tmp_path / "second", callbacks=[mine])
    fit.fit(tiny_module(), datamodule=tiny_data())
    assert mine in fit.callbacks
    assert list((tmp_path / "mine").glob("*.ckpt"))


def test_long_units_get_checkpoints_in_their_middle(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(tiny_module(steps_per_unit=2000), datamodule=tiny_data())
    (middle,) = [callback for callback in fit.callbacks if isinstance(callback, StepCheckpoint)]
    assert middle.save_last
    assert middle._every_n_train_steps == 1000


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_finished_fit_does_not_name_the_checkpoint_that_it_went_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path / "stopped", max_steps=9).fit(tiny_module(), datamodule=tiny_data())
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    trainer(tmp_path / "on", enable_checkpointing=False).fit(tiny_module(), datamodule=tiny_data(), ckpt_path=last)
    assert "checkpoint: " not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=:UserWarning")  # of Lightning, with such a callback
def test_a_checkpoint_callback_without_a_path_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, callbacks=[OnExceptionCheckpoint(tmp_path)]).fit(tiny_module(), datamodule=tiny_data())
    assert "summary: " in capsys.readouterr().out


def test_the_table_shows_three_rows_and_what_was_rolled_back() -> None:
    summary = {
        "weight_bits": 2, "act_bits": 4, "method": "qdrop", "contrastive": True, "teacher_top1": 88.55,
        "nearest_top1": 16.2, "student_top1": 86.125, "teacher_agreement": 91.0, "nearest_agreement": 16.5,
        "units": [{"name": "conv1", "accepted": False}, {"name": "fc", "accepted": True}], "complete": True,
    }  # fmt: skip
    lines = table(summary).splitlines()
    assert [line.split()[-2:] for line in lines[2:5]] == [["88.55", "100.00"], ["16.20", "16.50"], ["86.12", "91.00"]]
    assert lines[4].startswith("qdrop + contrastive, W2A4")
    assert lines[5].endswith("'conv1'")
    assert len(lines) == 6
    assert " - " in table(summary | {"student_top1": None}) + " "
    nothing = dict.fromkeys(key for key in summary if key.endswith(("_top1", "_agreement")))
    said = "no validation images were read; on those of calibration 93.75 % agreement with the teacher"
    assert table(summary | nothing | {"calibration_agreement": 93.75}).splitlines()[1:] == [said, lines[5]]
    assert (
        table(summary | nothing | {"calibration_agreement": None}).splitlines()[1] == "no validation images were read"
    )
    assert table(summary | nothing | {"complete": False}).splitlines()[1:] == [lines[5]]


def test_a_summary_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
