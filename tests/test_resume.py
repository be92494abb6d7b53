"""Resuming ends with the very same parameters as never having stopped, from every kind of checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_ptq
from lightning_ptq import Augmentation, CalibrationDataModule, ContrastiveConfig, PTQError, PTQModule, QuantConfig
from tests.helpers import (
    assert_equal_states,
    quantization_state,
    tiny_data,
    tiny_images,
    tiny_module,
    tiny_net,
    trainer,
)

pytestmark = [
    # Runs here resume without the callback that wrote the checkpoints, and into a folder of their own.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]

RATES = ("teacher_top1", "nearest_top1", "student_top1", "teacher_agreement")
POSITIONS = ContrastiveConfig(feature="positions", positions=32)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "contrastive": {"module": {"contrastive": True}},
    "brecq": {"module": {"method": "brecq"}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2}},
    "limited": {"trainer": {"limit_train_batches": 2}},
    "validated each unit": {"trainer": {"check_val_every_n_epoch": 2}},
    "long last epoch": {"module": {"network_steps": 7}},
    "held out": {"module": {"network_steps": 4, "held_out": 0.7}},
    "rounded again": {
        "module": {"network_steps": 5, "network_rounding_lr": 0.2, "augment": Augmentation(flip=True, shift=1)}
    },
    "settled": {"module": {"steps_per_unit": 4, "settle": 0.99}},
    "corrected": {"module": {"method": "pdquant", "distribution_steps": 3}},
    "flexround": {
        "module": {"method": "flexround", "network_rounding_lr": 0.05, "contrastive": True, "critic": POSITIONS}
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_resume_is_bit_equal_from_every_step(tmp_path: Path, case: dict[str, Any]) -> None:
    every_step = ModelCheckpoint(tmp_path / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings = case.get("trainer", {})
    options = {"steps_per_unit": 3} | case.get("module", {})
    whole = tiny_module(**options)
    trainer(tmp_path / "whole", callbacks=[every_step], **settings).fit(whole, datamodule=tiny_data(24, more=16))
    expected, reports = (
        quantization_state(whole),
        [(r.name, r.mse_after, r.accepted, r.settled_after) for r in whole.reports],
    )
    checkpoints = sorted((tmp_path / "all").glob("*.ckpt"))
    assert len(checkpoints) >= 8
    for checkpoint in checkpoints:
        module = tiny_module(**options)
        resumed = trainer(tmp_path / f"resumed-{checkpoint.stem}", enable_checkpointing=False, **settings)
        resumed.fit(module, datamodule=tiny_data(24, more=16), ckpt_path=checkpoint)
        assert_equal_states(quantization_state(module), expected)
        assert [(r.name, r.mse_after, r.accepted, r.settled_after) for r in module.reports] == reports


def test_resume_is_bit_equal_from_the_checkpoints_that_a_fit_leaves(tmp_path: Path) -> None:
    whole = tiny_module()
    trainer(tmp_path / "whole").fit(whole, datamodule=tiny_data())
    last = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    assert last.exists()
    stopped = tiny_module()
    trainer(tmp_path / "stopped", max_epochs=2).fit(stopped, datamodule=tiny_data())
    module = tiny_module()
    resumed = trainer(tmp_path / "resumed")
    resumed.fit(module, datamodule=tiny_data(), ckpt_path=tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert_equal_states(quantization_state(module), quantization_state(whole))
    finished = tiny_module()
    trainer(tmp_path / "finished").validate(finished, datamodule=tiny_data(), ckpt_path=last, verbose=False)
    assert_equal_states(quantization_state(finished), quantization_state(whole))


class Crash(Callback):
    """Fails where a hook is called in an epoch, like a machine that goes away: nothing is tidied up."""

    def __init__(self, hook: str, epoch: int) -> None:
        def fail(trainer: L.Trainer, *args: Any) -> None:
            if trainer.current_epoch == epoch and not trainer.sanity_checking:
                raise OSError("gone")

        setattr(self, hook, fail)


@pytest.mark.parametrize(
    ("hook", "epoch", "done"),
    [("on_train_epoch_start", 1, 1), ("on_train_batch_start", 3, 3), ("on_validation_batch_start", 4, 4)],
)
def test_a_crash_loses_no_finished_unit(tmp_path: Path, hook: str, epoch: int, done: int) -> None:
    whole = tiny_module()
    trainer(tmp_path / "whole").fit(whole, datamodule=tiny_data())
    crashed, last = tiny_module(), tmp_path / "crashed" / "checkpoints" / "last.ckpt"
    with pytest.raises(OSError, match="gone"):
        trainer(tmp_path / "crashed", callbacks=[Crash(hook, epoch)]).fit(crashed, datamodule=tiny_data())
    state = torch.load(last, weights_only=True)
    assert len(state["lightning_ptq"]["session"]["reports"]) == done
    module = tiny_module()
    trainer(tmp_path / "resumed").fit(module, datamodule=tiny_data(), ckpt_path=last)
    assert_equal_states(quantization_state(module), quantization_state(whole))
    assert [r.mse_after for r in module.reports] == [r.mse_after for r in whole.reports]
    # Also what crashed in its last validation, though Lightning takes that fit for done.
    resumed, expected = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("resumed", "whole"))
    assert [resumed[key] for key in RATES] == [expected[key] for key in RATES]


class Stop(Callback):
    """Ends a fit as `max_time` does, behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.step


@pytest.mark.parametrize("by_time", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_resume_goes_on_in_the_middle_of_the_unit_that_a_limit_stopped(
    tmp_path: Path, accumulated: int, by_time: bool
) -> None:
    """From our checkpoint, from one of the user's own callback and from one that the user writes."""

    def run(name: str, ckpt_path: Path | None = None, **settings: Any) -> tuple[L.Trainer, PTQModule]:
        module, done = tiny_module(), trainer(tmp_path / name, accumulate_grad_batches=accumulated, **settings)
        done.fit(module, datamodule=tiny_data(), ckpt_path=ckpt_path)
        return done, module

    unlimited, whole = run("whole")
    step = 9 // accumulated
    limit = {} if by_time else {"max_steps": step}
    stop = [Stop(step)] if by_time else []
    done, stopped = run("stopped", callbacks=[*stop], **limit)
    assert len(stopped.reports) == 1, "the second unit was stopped in its middle and must not be judged"
    done.save_checkpoint(tmp_path / "by_hand.ckpt")
    run("own", callbacks=[*stop, ModelCheckpoint(tmp_path / "mine", "own", save_on_train_epoch_end=True)], **limit)
    ours = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    for path in (ours, tmp_path / "by_hand.ckpt", tmp_path / "mine" / "own.ckpt"):
        resumed, module = run(f"resumed-{path.stem}", path)
        assert_equal_states(quantization_state(module), quantization_state(whole))
        assert resumed.global_step == len(module.epoch_names) * 6 // accumulated
        assert torch.load(path, weights_only=True)["epoch"] == 1
        loops = [t.fit_loop.epoch_loop for t in (resumed, unlimited)]
        assert loops[0]._batches_that_stepped == loops[1]._batches_that_stepped, "what loggers count"


def test_a_checkpoint_from_before_the_first_step_goes_on(tmp_path: Path) -> None:
    class Early(Callback):
        def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    whole, resumed = tiny_module(), tiny_module()
    trainer(tmp_path / "whole", callbacks=[Early()]).fit(whole, datamodule=tiny_data())
    assert torch.load(tmp_path / "early.ckpt", weights_only=True)["epoch"] == 0
    trainer(tmp_path / "resumed").fit(resumed, datamodule=tiny_data(), ckpt_path=tmp_path / "early.ckpt")
    assert_equal_states(quantization_state(resumed), quantization_state(whole))


@pytest.mark.parametrize(("step", "every"), [(27, 5), (9, 2), (12, None)])
def test_steps_are_saved_before_a_validation_that_fails(tmp_path: Path, step: int, every: int | None) -> None:
    """Lightning validates where `max_time` stops the fit, and at a unit's end where it counts batches."""
    limits = {"check_val_every_n_epoch": every} | ({"val_check_interval": 12} if every is None else {})
    fails = Crash("on_validation_batch_start", (step - 1) // 6)
    with pytest.raises(OSError, match="gone"):
        trainer(tmp_path, callbacks=[fails, *([Stop(step)] if every else [])], **limits).fit(
            tiny_module(), datamodule=tiny_data()
        )
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step


@pytest.mark.parametrize("steps", [6, 12, 24, 25, 26])
def test_resume_with_max_steps_at_the_end_of_a_unit(tmp_path: Path, steps: int) -> None:
    """A job that runs slice by slice: units of 6 steps, a last epoch of 3."""
    whole = tiny_module(network_steps=3)
    trainer(tmp_path / "whole").fit(whole, datamodule=tiny_data())
    trainer(tmp_path / "stopped", max_steps=steps).fit(tiny_module(network_steps=3), datamodule=tiny_data())
    module = tiny_module(network_steps=3)
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    trainer(tmp_path / "resumed", max_steps=27).fit(module, datamodule=tiny_data(), ckpt_path=last)
    assert_equal_states(quantization_state(module), quantization_state(whole))
    assert [r.name for r in module.reports] == list(module.epoch_names)


def test_a_run_that_was_done_is_continued_into_a_whole_run_folder(tmp_path: Path) -> None:
    done = tiny_module(steps_per_unit=2)
    trainer(tmp_path / "done", logger=True).fit(done, datamodule=tiny_data())
    last = next((tmp_path / "done").rglob("last.ckpt"))
    again = tiny_module(steps_per_unit=2)
    trainer(tmp_path / "again", logger=True).fit(again, datamodule=tiny_data(), ckpt_path=last)
    copied = next((tmp_path / "again").rglob("last.ckpt"))
    assert copied.parent.parent == next((tmp_path / "again").rglob("summary.json")).parent
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (last, copied)]
    assert_equal_states(*states)


def test_a_run_that_was_done_keeps_the_counts_of_its_images(tmp_path: Path) -> None:
    trainer(tmp_path / "run").fit(tiny_module(held_out=0.5), datamodule=tiny_data(40, more=20))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trainer(tmp_path / "again").fit(tiny_module(held_out=0.5), datamodule=tiny_data(24), ckpt_path=last)
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "again"))
    for key in ("calibration_samples", "judging_samples", "digests"):
        assert second[key] == first[key], key
    assert first["judging_samples"] == 20


def test_seconds_add_up_over_what_was_resumed(tmp_path: Path) -> None:
    first = tiny_module(steps_per_unit=4)
    trainer(tmp_path / "first", max_steps=6).fit(first, datamodule=tiny_data())
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)["lightning_ptq"]["session"]["wall_seconds"]
    assert saved["total"] > saved["ranges"] + saved["calibration"] > 0
    saved["total"] = 1000.0
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["lightning_ptq"]["session"]["wall_seconds"] = saved
    torch.save(checkpoint, last)
    trainer(tmp_path / "second").fit(tiny_module(steps_per_unit=4), datamodule=tiny_data(), ckpt_path=last)
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert 1000 < summary["wall_seconds"]["total"] < 1100


def test_a_checkpoint_holds_no_teacher_and_only_tensors_and_primitives(tmp_path: Path) -> None:
    trainer(tmp_path).fit(tiny_module(), datamodule=tiny_data())
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [key for key in checkpoint["state_dict"] if key.startswith("teacher.")]
    assert len(checkpoint["lightning_ptq"]["session"]["reports"]) == 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    trainer(folder, max_epochs=1).fit(tiny_module(), datamodule=tiny_data())
    return folder / "checkpoints" / "last.ckpt"


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    net = tiny_net()
    net.fc.weight.data += 1e-3
    other = PTQModule(net, QuantConfig(2, 2), steps_per_unit=6, batch_size=8, seed=3)
    with pytest.raises(PTQError, match="a model with other weights"):
        trainer(tmp_path).fit(other, datamodule=tiny_data(), ckpt_path=checkpoint)


def test_a_checkpoint_of_another_config_is_refused_and_named(checkpoint: Path, tmp_path: Path) -> None:
    other = PTQModule(tiny_net(), QuantConfig(2, 4), steps_per_unit=6, batch_size=8, seed=3)
    with pytest.raises(PTQError, match="quantization config: act_bits=2 in the checkpoint, 4 here"):
        trainer(tmp_path).validate(other, datamodule=tiny_data(), ckpt_path=checkpoint)
    with pytest.raises(PTQError, match=r"another calibration setting: .*steps_per_unit=6 in the checkpoint, 7 here"):
        trainer(tmp_path).fit(tiny_module(steps_per_unit=7), datamodule=tiny_data(), ckpt_path=checkpoint)
    with pytest.raises(PTQError, match="precision='32-true' in the checkpoint, 'bf16-mixed' here"):
        trainer(tmp_path, precision="bf16-mixed").fit(tiny_module(), datamodule=tiny_data(), ckpt_path=checkpoint)


def test_another_network_is_named_before_its_settings_and_not_for_experts_either(
    checkpoint: Path, tmp_path: Path
) -> None:
    said = (
        r"another model: TinyNet with 6 quantized layers, and this is ResNet with 21\. The first that differs is "
        r"'conv1': none and 64x3x7x7\. Give the model"
    )
    quant = QuantConfig(2, 4)
    other = PTQModule(torchvision.models.resnet18().eval(), quant, "adaround", allow_drift=True)
    with pytest.raises(PTQError, match=said) as told:
        other.restore(torch.load(checkpoint, weights_only=True))
    assert "allow_drift" not in str(told.value)
    wider = tiny_net()
    wider.fc = torch.nn.Linear(8, 7)
    older = torch.load(checkpoint, weights_only=True)
    del older["lightning_ptq"]["model_name"]
    with pytest.raises(PTQError, match=r"a network with 6 .* this is TinyNet with 6\. .* is 'fc': 5x8 and 7x8\."):
        PTQModule(wider.eval(), QuantConfig(2, 2)).restore(older)


def test_where_the_method_differs_it_is_named_and_not_what_it_decides(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PTQError, match=r"quantization config: method='qdrop' in the checkpoint, 'adaround' here\. Use"):
        trainer(tmp_path).fit(tiny_module(method="adaround"), datamodule=tiny_data(), ckpt_path=checkpoint)
    with pytest.raises(PTQError, match=r"config: rounding='adaround' in the checkpoint, 'flexround' here\. Use"):
        trainer(tmp_path).fit(tiny_module(rounding="flexround"), datamodule=tiny_data(), ckpt_path=checkpoint)


def test_a_checkpoint_of_other_images_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PTQError, match="calibrated on other images"):
        trainer(tmp_path).fit(tiny_module(), datamodule=tiny_data(count=32), ckpt_path=checkpoint)


def test_the_same_images_in_another_order_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    data = CalibrationDataModule.from_loaders([tiny_images(40).flip(0)])
    with pytest.raises(PTQError, match="or on these in another order"):
        trainer(tmp_path).fit(tiny_module(), datamodule=data, ckpt_path=checkpoint)


def test_another_major_version_s_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    assert state["lightning_ptq"]["version"] == lightning_ptq.__version__
    state["lightning_ptq"]["version"] = "99.1.0"
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(PTQError, match=r"of lightning_ptq 99\.1\.0, and this is .*: another major version"):
        trainer(tmp_path / "run").fit(tiny_module(), datamodule=tiny_data(), ckpt_path=tmp_path / "other.ckpt")


def test_experts_may_go_on_with_what_differs_and_are_told(checkpoint: Path, tmp_path: Path) -> None:
    module = tiny_module(steps_per_unit=7, allow_drift=True)
    with pytest.warns(UserWarning, match="Going on: allow_drift=True") as told:
        trainer(tmp_path).fit(module, datamodule=tiny_data(count=32), ckpt_path=checkpoint)
    words = [str(warning.message) for warning in told if "allow_drift=True" in str(warning.message)]
    assert len(words) == 2
    assert "steps_per_unit=6 in the checkpoint, 7 here" in words[0]
    assert "calibrated on other images" in words[1]
    assert len(module.reports) == 5


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "loops": {}}, tmp_path / "other.ckpt")
    with pytest.raises(PTQError, match="not written by lightning_ptq"):
        trainer(tmp_path / "run").validate(tiny_module(), datamodule=tiny_data(), ckpt_path=tmp_path / "other.ckpt")


def test_a_checkpoint_from_before_there_were_some_settings_goes_on(tmp_path: Path) -> None:
    trainer(tmp_path / "stopped", max_steps=9).fit(tiny_module(), datamodule=tiny_data())
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    for name in ("settle", "cache_dtype"):
        del checkpoint["lightning_ptq"]["settings"][name]
    del checkpoint["lightning_ptq"]["session"]["settling"]
    torch.save(checkpoint, last)
    module = tiny_module()
    trainer(tmp_path / "resumed").fit(module, datamodule=tiny_data(), ckpt_path=last)
    assert len(module.reports) == len(module.epoch_names)
    with pytest.raises(PTQError, match=r"settle=0\.0 in the checkpoint, 0\.5 here"):
        trainer(tmp_path / "other").fit(tiny_module(settle=0.5), datamodule=tiny_data(), ckpt_path=last)
