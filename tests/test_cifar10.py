"""Real images and a trained ResNet-20, where LIGHTNING_PTQ_CIFAR10 names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_ptq.cli import main


@pytest.mark.parametrize("bits", ["w2a2", "w4a4"])
def test_a_few_steps_bring_back_most_of_what_rounding_lost(cifar_root: Path, tmp_path: Path, bits: str) -> None:
    config = Path(__file__).parent.parent / "configs" / "cifar10" / f"resnet20_{bits}.yaml"
    main(
        [
            "fit",
            f"--config={config}",
            f"--data.root={cifar_root}",
            "--data.calibration_samples=256",
            f"--model.weights={cifar_root / 'teachers' / 'resnet20.pt'}",
            "--model.steps_per_unit=40",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.logger=false",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.limit_val_batches=4",
        ]
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher_top1"] > 80
    lost = summary["teacher_top1"] - summary["nearest_top1"]
    left = summary["teacher_top1"] - summary["student_top1"]
    assert left < 0.5 * lost
