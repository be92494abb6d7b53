"""Several optimisation steps in one of Lightning's: the same steps, whatever their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ptq import PTQError, PTQModule
from lightning_ptq.checks import counts_batches, leaves_gradients_alone
from tests.helpers import assert_equal_states, quantization_state, tiny_data, tiny_module, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")


def fit(folder: Path, each: int | None, ckpt_path: Path | None = None, **changes: Any) -> PTQModule:
    settings: dict[str, Any] = {"steps_per_unit": 10, "network_steps": 7, "contrastive": True}
    module = tiny_module(steps_per_batch=each, **settings)
    trainer(folder, **changes).fit(module, datamodule=tiny_data(), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("each", [2, 4, 10, 100])
def test_steps_are_the_same_however_many_a_batch_has(tmp_path: Path, each: int) -> None:
    one, several = fit(tmp_path / "one", None), fit(tmp_path / "several", each)
    assert_equal_states(quantization_state(several), quantization_state(one))
    assert one.trainer.global_step == 4 * 10 + 7
    assert several.trainer.global_step == 4 * -(-10 // each) + -(-7 // each)
    assert several.session.curves["whole-network"]["step"] == one.session.curves["whole-network"]["step"]
    assert several.session.curves["whole-network"] == one.session.curves["whole-network"]


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 13])
def test_resume_in_the_middle_of_a_unit(tmp_path: Path, stop: int) -> None:
    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "stopped", 4, max_steps=stop)
    resumed = fit(tmp_path / "resumed", 4, tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert_equal_states(quantization_state(resumed), quantization_state(whole))


def test_a_checkpoint_of_another_number_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "stopped", 4, max_steps=2)
    with pytest.raises(PTQError, match="steps_per_batch"):
        fit(tmp_path / "resumed", 2, tmp_path / "stopped" / "checkpoints" / "last.ckpt")


def test_who_asks_for_no_number_goes_on_with_that_of_the_checkpoint(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "stopped", 4, max_steps=5)
    resumed = fit(tmp_path / "resumed", None, tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert resumed.steps_per_batch == 4
    assert_equal_states(quantization_state(resumed), quantization_state(whole))


def test_a_limit_counts_batches(tmp_path: Path) -> None:
    module = fit(tmp_path, 4, limit_train_batches=2)
    assert module.trainer.global_step == 5 * 2
    assert [module.session.curves[name]["step"][-1] for name in module.epoch_names] == [8, 8, 8, 8, 7]


@pytest.mark.parametrize(
    "settings",
    [{"max_steps": 5}, {"limit_train_batches": 3}, {"overfit_batches": 2}, {"val_check_interval": 2}, {"callbacks": [
        ModelCheckpoint(every_n_train_steps=3)]}],
)  # fmt: skip
def test_a_trainer_that_counts_batches_is_known(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert counts_batches(trainer(tmp_path, **settings))
    assert not counts_batches(trainer(tmp_path))


def test_who_looks_at_gradients_sees_each_of_them(tmp_path: Path) -> None:
    class Norms(L.Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            """What it does is of no matter."""

    assert leaves_gradients_alone(trainer(tmp_path))
    assert not leaves_gradients_alone(trainer(tmp_path, callbacks=[Norms()]))
    with pytest.raises(PTQError, match="no callback or module hook that looks at"):
        fit(tmp_path, 4, callbacks=[Norms()])


@pytest.mark.parametrize("changes", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}])
def test_what_acts_on_single_steps_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(PTQError, match="steps_per_batch=4 needs one device"):
        fit(tmp_path, 4, **changes)


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(PTQError, match="steps_per_batch=0"):
        tiny_module(steps_per_batch=0)
