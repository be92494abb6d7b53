"""Exported programs of PyTorch do what the simulation does, for any number of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_ptq as ptq
from lightning_ptq import PTQError, QuantConfig
from lightning_ptq.export import pt2
from tests.helpers import tiny_data, tiny_images, tiny_module, trainer


def fitted(folder: Path, quant: QuantConfig) -> ptq.PTQModule:
    module = tiny_module(quant, steps_per_unit=3)
    trainer(folder, logger=False).fit(module, datamodule=tiny_data())
    return module


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_program_does_what_the_simulation_does(tmp_path: Path, bits: int) -> None:
    module, path = fitted(tmp_path, QuantConfig(bits, bits)), tmp_path / "out" / "model.pt2"
    report = ptq.export_pt2(module, path)
    assert report.passed, report.text()
    assert report.agreement == 100.0
    assert [p.name for p in path.parent.iterdir()] == ["model.pt2"]
    x = tiny_images(5, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(pt2.load_pt2(path)(x)[0], module.eval()(x))
    with pytest.raises(PTQError, match="exists and is kept"):
        ptq.export_pt2(module, path)


def test_a_program_that_differs_is_found_out_and_the_unit_named(tmp_path: Path, monkeypatch: Any) -> None:
    module = fitted(tmp_path, QuantConfig(8, 8))

    def broken(student: Any, every_unit: bool = False) -> Any:
        model = convert(student, every_unit)
        model.get_buffer("blocks.0.conv2.scale").mul_(3)
        return model

    convert = pt2.convert
    monkeypatch.setattr(pt2, "convert", broken)
    report = ptq.export_pt2(module, tmp_path / "model.pt2")
    assert not report.passed
    assert report.unit == "blocks.0"
