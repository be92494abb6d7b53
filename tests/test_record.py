"""What is taken down for the report says what happened, and says the same after a resume."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_ptq.quantizers import ActQuantizer
from lightning_ptq.ranges import Histogram
from lightning_ptq.record import BINS, activation_record, coarse, confusion, plain, weight_record
from lightning_ptq.weights import AdaRound
from tests.helpers import tiny_data, tiny_module, trainer


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(20_000, generator=torch.Generator().manual_seed(0)).relu()


def test_a_coarse_histogram_counts_what_was_seen(values: torch.Tensor) -> None:
    seen = Histogram()
    for part in (values * 0.1, values):  # the range grows
        seen.update(part)
    found = coarse(seen)
    both = torch.cat([values * 0.1, values])
    assert len(found["counts"]) <= BINS
    assert sum(found["counts"]) == len(both)
    bars = ((both - found["start"]) / found["width"]).floor().long()
    expected = torch.bincount(bars, minlength=len(found["counts"]))
    # An element may lie on the other side of an edge where bins were merged after it was counted.
    assert (expected - torch.tensor(found["counts"])).abs().sum() <= 4


@pytest.mark.parametrize(("bits", "tolerance"), [(2, 0.1), (4, 0.1), (8, 0.6)])
def test_an_activations_noise_is_that_of_its_values(values: torch.Tensor, bits: int, tolerance: float) -> None:
    seen = Histogram()
    seen.update(values)
    q = ActQuantizer(bits)
    q.start(seen, "mse")
    q.log_scale.data += 0.05
    found = activation_record(q, coarse(seen))
    with torch.no_grad():
        noise = (q(values) - values).double().square().sum()
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(values.double().square().sum() / noise), abs=tolerance)
    low, high = found["range"]
    assert (low, high) == pytest.approx((0.0, (2**bits - 1) * float(q.scale)))
    assert found["clipped_fraction"] == pytest.approx(float((values > high).float().mean()), abs=0.002)
    assert found["initial_range"][1] == pytest.approx(high * math.exp(-0.05))


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_counted_on_their_grid(symmetric: bool) -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    q = AdaRound(weight.shape, 2, symmetric=symmetric)
    scale = weight.abs().amax((1, 2, 3)) / 2
    q.set_range(weight, scale, torch.zeros(4) if symmetric else torch.tensor([1.0, 2.0, 1.0, 2.0]))
    q.alpha.data[0] = 1.0  # all of the first channel up
    found = weight_record(weight, q)
    for nearest, key in ((True, "nearest"), (False, "calibrated")):
        expected = Counter(int(k) for k in (q.integers(weight, nearest=nearest) - q.zero_point).flatten())
        counted = {found["first"] + i: n for i, n in enumerate(found[key]) if n}
        assert counted == dict(expected)
    assert found["flipped_fraction"] == pytest.approx(q.flipped(weight) / weight.numel())
    assert sum(found["float"]) == weight.numel()
    lowest = float((weight / q.scale).min())
    first = next(i for i, n in enumerate(found["float"]) if n)
    edge = found["start"] + first / found["bars_per_step"]
    assert edge <= max(lowest, found["start"]) < edge + 1 / found["bars_per_step"]


def test_many_classes_keep_their_most_frequent_swaps_only() -> None:
    teacher, student = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 1, 2, 2, 2])
    few = confusion(teacher * 5 + student, 5)
    assert {tuple(pair) for pair in few["pairs"]} == {(0, 0, 1), (0, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 1)}
    many = confusion(teacher * 1000 + student, 1000)
    assert many["pairs"] == [[1, 2, 2], [0, 1, 1]]
    assert (many["images"], many["classes"]) == (6, 1000)
    assert confusion(teacher * 5 + student, 5, list("abcde"))["names"] == list("abcde")
    assert not confusion(teacher * 5 + student, 5, list("abcd"))["names"], "of four folders, not of five outputs"


def test_plain_values_are_what_json_has() -> None:
    found = plain({"a": [math.inf, math.nan, 0.123456789], "b": (1, "x", None, True)})
    assert json.loads(json.dumps(found, allow_nan=False)) == {"a": [None, None, 0.1234568], "b": [1, "x", None, True]}


def test_a_resumed_run_records_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    trainer(tmp_path / "whole").fit(tiny_module(), datamodule=tiny_data())
    trainer(tmp_path / "run", max_steps=9).fit(tiny_module(), datamodule=tiny_data())
    stopped = json.loads((tmp_path / "run" / "record.json").read_text())
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trainer(tmp_path / "run").fit(tiny_module(), datamodule=tiny_data(), ckpt_path=last)
    whole, resumed = ((tmp_path / run / "record.json").read_bytes() for run in ("whole", "run"))
    assert resumed == whole
    curves = json.loads(whole)["curves"]
    assert curves["stem"]["step"] == [1, 2, 3, 4, 5, 6]
    assert list(curves) == ["stem", "blocks.0", "blocks.1", "fc", "whole-network"]
    assert stopped["curves"]["blocks.0"]["step"] == [1, 2, 3]
    assert not stopped["confusion"], "what an unfinished network gives was not measured"


def test_short_units_are_noted_more_often_than_they_are_logged(tmp_path: Path) -> None:
    logged: list[int] = []

    class Counting(DummyLogger):
        def log_metrics(self, metrics: Any, step: int) -> None:
            logged.extend([step] * ("units/stem/reconstruction" in metrics))

    run = trainer(tmp_path, logger=[Counting()], log_every_n_steps=50, max_steps=45)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # fewer steps than the interval
        run.fit(tiny_module(steps_per_unit=45, network_steps=0), datamodule=tiny_data())
    curve = json.loads((tmp_path / "record.json").read_text())["curves"]["stem"]
    assert curve["step"] == [*range(2, 45, 2), 45]
    assert len(curve["reconstruction"]) == 23
    assert len(logged) == 1


def test_the_confusion_is_what_the_agreement_counts(tmp_path: Path) -> None:
    data = tiny_data()
    data.val_dataloader().dataset.classes = list("abcde")  # as torchvision's data sets have them
    trainer(tmp_path).fit(tiny_module(), datamodule=data)
    summary, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("summary", "record"))
    for network, key in (("student", "teacher_agreement"), ("nearest", "nearest_agreement")):
        confused = found["confusion"][network]
        same = sum(n for teacher, student, n in confused["pairs"] if teacher == student)
        assert confused["images"] == 30
        assert confused["names"] == list("abcde")
        assert 100 * same / 30 == pytest.approx(summary[key], abs=1e-4)
