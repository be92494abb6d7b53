"""Two and four gloo processes: identical parameters on all ranks, whatever happened before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_ptq import Augmentation, ContrastiveConfig, QuantConfig
from lightning_ptq.quantizers import act_quantizers, weight_quantizers
from tests.helpers import assert_equal_states, quantization_state, tiny_data, tiny_module, trainer

pytestmark = [
    pytest.mark.forks,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    # Of torch's own process group and of Lightning's advice on spawned or forked processes.
    pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log.*sync_dist=True`"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
]


ROUNDED_AGAIN: dict[str, Any] = {
    "contrastive": True,
    "critic": ContrastiveConfig(feature="positions"),
    "network_rounding_lr": 0.2,
    "augment": Augmentation(flip=True, shift=1),
}


class SameOnAllRanks(L.Callback):
    """Fails inside the worker if ranks differ after a unit, or did not learn anything."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        for key, value in quantization_state(pl_module).items():
            every = pl_module._all(value.float())
            assert len(every) == trainer.world_size
            assert all(torch.equal(every[0], other) for other in every[1:]), (trainer.current_epoch, key)
        # This hook runs before the unit is judged, so what was learned is still there. At 8 bits there is little.
        if trainer.current_epoch < len(pl_module.student):
            learned = [q for q in act_quantizers(pl_module.student.units[trainer.current_epoch]) if q.bits < 8]
            moved = [not torch.equal(q.log_scale, q.initial_log_scale) for q in learned]
            assert all(m == (pl_module.method.scales != "none") for m in moved)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        # The whole network is judged before this callback hears of the epoch's end, because it is validated.
        if trainer.current_epoch == len(pl_module.student):
            assert all(q.log_gain.any() and q.bias_shift.any() for q in weight_quantizers(pl_module.student))


def fit_on_two(folder: Path, ckpt_path: Path | None = None, **changes: Any) -> Any:
    module = tiny_module(**({"steps_per_unit": 5, "rounding_lr": 0.05} | changes))
    two = trainer(folder, devices=2, strategy="ddp_fork", callbacks=[SameOnAllRanks()], use_distributed_sampler=False)
    two.fit(module, datamodule=tiny_data(), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"contrastive": True},
        {"method": "brecq"},
        {"method": "nearest"},
        {"steps_per_unit": 10, "settle": 0.99},
        ROUNDED_AGAIN,
    ],
)
def test_all_ranks_leave_every_unit_with_the_same_parameters(tmp_path: Path, changes: dict[str, Any]) -> None:
    module = fit_on_two(tmp_path, **changes)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(checkpoint["lightning_ptq"]["session"]["reports"]) == len(module.epoch_names)
    summary, record = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("summary", "record"))
    confused = record["confusion"]["student"]
    same = sum(n for teacher, student, n in confused["pairs"] if teacher == student)
    assert confused["images"] == 2 * 30, "each process validates all images here"
    assert 100 * same / 60 == pytest.approx(summary["teacher_agreement"], abs=1e-4)


def test_four_processes_with_uneven_shares_leave_every_unit_alike(tmp_path: Path) -> None:
    module = tiny_module(steps_per_unit=4, rounding_lr=0.05, network_steps=3, contrastive=True, batch_size=2)
    four = trainer(
        tmp_path, devices=4, strategy="ddp_fork", callbacks=[SameOnAllRanks()], use_distributed_sampler=False
    )
    four.fit(module, datamodule=tiny_data(42))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [unit["name"] for unit in summary["units"]] == list(module.epoch_names)
    assert summary["complete"]


def test_bits_are_chosen_alike_where_processes_have_uneven_shares(tmp_path: Path) -> None:
    module = tiny_module(QuantConfig(2, 2, average_bits=3.0), steps_per_unit=2)
    two = trainer(tmp_path, devices=2, strategy="ddp_fork", callbacks=[SameOnAllRanks()], use_distributed_sampler=False)
    two.fit(module, datamodule=tiny_data(41))
    chosen = json.loads((tmp_path / "summary.json").read_text())["bits"]
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["lightning_ptq"]["session"]["bits"] == chosen


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    fit_on_two(folder, network_steps=2)
    return folder


@pytest.mark.parametrize("steps", [8, 20, 21])  # in a unit, behind the last one, in the whole network's epoch
def test_resume_on_two_processes_is_bit_equal(whole: Path, tmp_path: Path, steps: int) -> None:
    stopped = tiny_module(steps_per_unit=5, rounding_lr=0.05, network_steps=2)
    two = trainer(tmp_path / "stopped", devices=2, strategy="ddp_fork", max_steps=steps, use_distributed_sampler=False)
    two.fit(stopped, datamodule=tiny_data())
    fit_on_two(tmp_path / "resumed", network_steps=2, ckpt_path=tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (whole, tmp_path / "resumed")
    ]
    assert_equal_states(*states)


def test_ranges_are_those_of_one_process_on_the_same_images(tmp_path: Path) -> None:
    fit_on_two(tmp_path / "two", method="nearest")
    trainer(tmp_path / "one", strategy="ddp_fork").fit(tiny_module(method="nearest"), datamodule=tiny_data())
    two, one = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in ("two", "one")
    )
    for key in quantization_state(tiny_module(method="nearest")):
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4, msg=key)


def test_a_share_smaller_than_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"batch_size=24 needs that many different images.*on each of 2 processes"):
        fit_on_two(tmp_path, batch_size=24)
