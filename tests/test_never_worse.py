"""Never worse than the start: what planted harm leaves behind, measured on images that no fit has seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ptq import CalibrationDataModule, PTQModule, QuantConfig, session
from lightning_ptq.cache import UnitCache
from lightning_ptq.calibration import no_worse
from lightning_ptq.methods import default_rates
from lightning_ptq.network import NetworkCache
from lightning_ptq.quantizers import act_quantizers, initial_ranges
from tests.helpers import tiny_images, tiny_net, trainer

# Images that steps draw, and all with those that judge.
STEPS, DRAWN, IMAGES = 20, 320, 352
ROUNDING_LR, SCALE_LR = default_rates(STEPS)
FRESH = tiny_images(400, seed=5)


def poisoned(kind: str, share: float) -> Tensor:
    """Calibration images of which a share is extreme."""
    generator = torch.Generator().manual_seed(0)
    images = tiny_images(IMAGES)
    rows = torch.randperm(IMAGES, generator=generator)[: int(share * IMAGES)]
    extreme = {
        "noise": 30.0 * torch.randn(images.shape, generator=generator),
        "constant": torch.full_like(images, 20.0),
        "huge": torch.full_like(images, 1e4),
        "black": torch.zeros_like(images),
    }
    images[rows] = extreme[kind][rows]
    return images


def fitted(folder: Path, images: Tensor | None = None, **changes: Any) -> PTQModule:
    net = tiny_net()
    with torch.no_grad():  # larger and centred logits
        net.fc.weight.mul_(20.0)
        net.fc.bias.sub_(net(tiny_images(40)).mean(0))
    settings: dict[str, Any] = {"steps_per_unit": STEPS, "batch_size": 8, "seed": 3}
    module = PTQModule(net, QuantConfig(2, 2), "qdrop", **(settings | changes))
    images = tiny_images(IMAGES) if images is None else images
    data = CalibrationDataModule.from_loaders(images.split(64), calibration_samples=DRAWN)
    trainer(folder).fit(module, datamodule=data)
    return module


@torch.no_grad()
def fresh_errors(module: PTQModule) -> tuple[dict[str, float], dict[str, float]]:
    """(initial, calibrated): of every unit on the same input, and of the whole network's output and predictions."""
    start: dict[str, float] = {}
    end: dict[str, float] = {}
    x = y = FRESH
    for name, student, teacher, weight in zip(
        module.student.names, module.student.units, module.teacher.units, module.session.importance, strict=True
    ):
        with initial_ranges(student):
            before = student(x)
        x, y = student(x), teacher(y)
        for errors, out in ((start, before), (end, x)):
            errors[name] = float((out - y).square().transpose(1, -1).matmul(weight).mean())
    with initial_ranges(module.student):
        nearest = module.student(FRESH)
    p = y.double().softmax(1)
    for errors, out in ((start, nearest), (end, x)):
        errors["output"] = float((out - y).square().mean())
        errors["divergence"] = float((p * (p / out.double().softmax(1)).log()).sum(1).mean())
    return start, end


# Biases that were put back still steer clear of ties: the outputs move by some ten-thousandths of a step.
TIES = 1.002
UNIT_HARM: dict[str, dict[str, Any]] = {
    "rounding_lr": {"rounding_lr": 1000 * ROUNDING_LR},
    "scale_lr": {"scale_lr": 1000 * SCALE_LR},
    "rounding_weight": {"rounding_weight": 1e9},
    **{
        f"{kind} {share}": {"images": poisoned(kind, share)}
        for kind in ("noise", "constant", "huge", "black")
        for share in (0.1, 0.3)
    },
}


@pytest.mark.parametrize("changes", UNIT_HARM.values(), ids=UNIT_HARM.keys())
def test_no_unit_is_worse_than_it_started(tmp_path: Path, changes: dict[str, Any]) -> None:
    module = fitted(tmp_path, network_steps=0, **changes)
    start, end = fresh_errors(module)
    assert all(end[name] <= start[name] * TIES for name in (*module.student.names, "output"))
    for report, unit in zip(module.reports, module.student.units, strict=True):
        if not report.accepted:
            assert all(torch.equal(q.log_scale, q.initial_log_scale) for q in act_quantizers(unit))
            assert (report.mse_after, report.flipped_fraction) == (report.mse_before, 0.0)
    if "scale_lr" in changes:
        units = json.loads((tmp_path / "summary.json").read_text())["units"]
        assert not all(unit["accepted"] for unit in units)


NETWORK_HARM: dict[str, dict[str, Any]] = {
    "network_lr": {"network_lr": 4.0},
    "network_rounding_lr": {"network_rounding_lr": 20.0},
    "all": {"network_lr": 4.0, "rounding_lr": 1000 * ROUNDING_LR, "scale_lr": 1000 * SCALE_LR},
    "noise": {"images": poisoned("noise", 0.1)},
    "huge": {"images": poisoned("huge", 0.1)},
}


@pytest.mark.parametrize("held_out", [0.0, 0.1])
@pytest.mark.parametrize("changes", NETWORK_HARM.values(), ids=NETWORK_HARM.keys())
def test_the_network_is_no_worse_than_it_started(tmp_path: Path, changes: dict[str, Any], held_out: float) -> None:
    module = fitted(tmp_path, held_out=held_out, **changes)
    start, end = fresh_errors(module)
    assert end["divergence"] <= start["divergence"] * TIES
    # To images that nothing was learned from, roundings that change so fast do no harm here.
    if "network_lr" in changes or ("network_rounding_lr" in changes and not held_out):
        assert not module.reports[-1].accepted


@pytest.mark.parametrize("steps", [0, 3])
def test_a_network_that_is_worse_as_a_whole_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether or not there is a last epoch; units were accepted one by one."""
    judge = session.worse_than_nearest

    def spoilt(cache: UnitCache | NetworkCache, images: Tensor, out: Tensor, *args: Any) -> bool:
        assert not judge(cache, images, out, *args)
        return judge(cache, images, out.flip(0), *args)

    monkeypatch.setattr(session, "worse_than_nearest", spoilt)
    module = fitted(tmp_path, network_steps=steps)
    start, end = fresh_errors(module)
    assert end == pytest.approx(start, rel=TIES - 1)
    assert [report.name for report in module.reports] == list(module.epoch_names)
    assert not any(report.accepted or report.flipped_fraction for report in module.reports)
    # The error that is left, on the images that judge, is that of rounding to nearest.
    x = tiny_images(IMAGES)[DRAWN:]
    with torch.no_grad():
        outputs, wanted = module.student(x), module.teacher(x)
    error = float((outputs - wanted).square().sum(1).mean())
    assert module.reports[-1].mse_before == module.reports[-1].mse_after
    if steps:  # biases are finished behind the judgement
        assert module.reports[-1].mse_after == pytest.approx(error, rel=1e-2)
    assert all(report.seconds > 0 for report in module.reports)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accepted"] is False
    agreement = 100.0 * float((outputs.argmax(1) == wanted.argmax(1)).float().mean())
    assert summary["calibration_agreement"] == pytest.approx(agreement, abs=20.0)
    assert "the whole network" in capsys.readouterr().out


def test_neither_the_mean_nor_that_of_the_usual_images_may_grow() -> None:
    def same(x: Tensor) -> Tensor:
        return x

    before = torch.tensor([1.0, 1.0, 2.0, 100.0])
    assert no_worse(before, before, same)
    assert not no_worse(torch.tensor([1.1, 1.1, 2.0, 1.0]), before, same), "one extreme image got better"
    assert not no_worse(torch.tensor([0.5, 0.5, 0.5, 110.0]), before, same)
    assert no_worse(torch.tensor([0.5, 1.1, 2.5, 90.0]), before, same)
    assert not no_worse(torch.full((4,), torch.nan), before, same)


def test_half_of_a_dozen_images_may_grow_by_chance() -> None:
    """Divergences of images that are recognised well are next to nothing, and one of them makes most of their mean."""
    before, after = torch.full((25,), 2e-4), torch.full((25,), 2e-4)
    before[13:], after[13:] = 0.2, 0.1
    after[0] = 9e-3
    assert no_worse(after, before, lambda x: x, usual_growth=1.5)
    after[:13] = 4e-4  # all of them grow
    assert not no_worse(after, before, lambda x: x, usual_growth=1.5)


def test_chance_is_that_of_the_images_of_all_processes() -> None:
    """The same mean growth of four times as many images is less likely to be chance."""
    before, after = torch.ones(40), torch.ones(40)
    before[20:] = after[20:] = 5.0
    after[20] = 3.0
    after[:20] += torch.tensor([3.0, -2.5] * 10)  # a growth of a quarter, at 0.4 standard errors
    after[:20] += 0.1
    before[20] = 30.0
    one, many = (no_worse(after, before, lambda x: x, processes=n) for n in (1, 400))
    assert one
    assert not many
