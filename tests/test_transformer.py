"""A transformer, and a network with a dense output, go through the whole of it like any other network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

from lightning_ptq import CalibrationDataModule, PTQError, PTQModule, QuantConfig
from lightning_ptq.importance import channel_importance
from tests.helpers import assert_equal_states, quantization_state, tiny_images, trainer


def vit() -> VisionTransformer:
    """Two encoder blocks of width 16, on 3x8x8 images, 5 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
        nn.init.normal_(model.heads.head.weight)
        return model.eval()


def module_of(model: nn.Module, **changes: Any) -> PTQModule:
    settings: dict[str, Any] = {"steps_per_unit": 40, "batch_size": 8, "seed": 3, "image_shape": (3, 8, 8)}
    return PTQModule(model, QuantConfig(weight_bits=3, act_bits=4), **(settings | changes))


def data_of(model: nn.Module, pick: Any = lambda y: y) -> CalibrationDataModule:
    images = tiny_images(30, seed=2)
    with torch.no_grad():
        labels = pick(model(images)).argmax(1)
    loader = DataLoader(TensorDataset(images, labels), batch_size=15)
    return CalibrationDataModule.from_loaders(tiny_images(40).split(20), loader, calibration_samples=40)


@pytest.mark.parametrize("contrastive", [False, True])
def test_a_transformer_is_calibrated_block_by_block(tmp_path: Path, contrastive: bool) -> None:
    model = vit()
    module = module_of(model, contrastive=contrastive)
    assert module.student.names == ("conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(2)), "heads")
    trainer(tmp_path).fit(module, datamodule=data_of(model))
    blocks = module.reports[1:3]
    assert all(report.accepted and report.mse_after < report.mse_before for report in blocks)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher_top1"] == 100.0
    assert summary["student_top1"] > 60  # 20 is chance


def test_a_transformer_resumes_bit_equal(tmp_path: Path) -> None:
    whole = module_of(vit(), steps_per_unit=6)
    trainer(tmp_path / "whole").fit(whole, datamodule=data_of(vit()))
    stopped = module_of(vit(), steps_per_unit=6)
    trainer(tmp_path / "stopped", max_steps=8).fit(stopped, datamodule=data_of(vit()))
    resumed, last = module_of(vit(), steps_per_unit=6), tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    trainer(tmp_path / "stopped").fit(resumed, datamodule=data_of(vit()), ckpt_path=last)
    assert_equal_states(quantization_state(whole), quantization_state(resumed))


def test_channels_of_tokens_are_the_last_dimension() -> None:
    module = module_of(vit())
    x, found = tiny_images(2), []
    with torch.no_grad():
        for k, unit in enumerate(module.student.units):
            x = unit(x)
            found.append(module.student.channel_dim(k, x.shape))
    assert found[1:] == [-1, -1, 1]
    weights = channel_importance(module.teacher, tiny_images(8), torch.device("cpu"), lambda x: x[None])
    assert [len(w) for w in weights[1:]] == [16, 16, 5]


class Growing(nn.Module):
    """Ends in more channels than its last layer writes, which are as many as the image is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc(torch.relu(torch.cat([x, self.grow(x)], 1)).mean((2, 3)))


class Back(nn.Module):
    """A linear layer over channels in the last dimension, which come back in front: as many as the image is wide."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.inner, self.fc, self.how = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 5), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.inner(x.permute(0, 2, 3, 1))
        y = y.permute(0, 3, 1, 2) if self.how == "permute" else y.transpose(2, 3).transpose(1, 2)
        return self.fc((x + y).mean((2, 3)))


@pytest.mark.parametrize("model", [Growing(), Back("permute"), Back("transpose")])
def test_channels_are_told_from_columns_of_pixels(model: nn.Module) -> None:
    chain, x = module_of(model.eval(), granularity="layer").student, tiny_images(2)
    with torch.no_grad():
        for k, unit in enumerate(chain.units):
            x = unit(x)
            assert chain.channel_dim(k, x.shape) == 1, chain.names[k]


class Dense(nn.Module):
    """A prediction for every pixel, in a dict as torchvision's segmentation networks give it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.head(torch.relu(self.stem(x)))
        return {"out": nn.functional.interpolate(y, x.shape[-2:], mode="bilinear")}


def test_a_dense_output_is_calibrated_and_judged_pixel_by_pixel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Dense().eval()
    module = module_of(model, steps_per_unit=200)
    trainer(tmp_path).fit(module, datamodule=data_of(model, lambda y: y["out"]))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert module(tiny_images(2)).shape == (2, 5, 8, 8)
    assert summary["teacher_top1"] == 100.0
    assert 50 < summary["student_top1"] <= 100
    assert summary["teacher_miou"] == pytest.approx(100.0)
    assert summary["nearest_miou"] < summary["student_miou"] < summary["student_top1"]


class Depth(Dense):
    """One number for every pixel: there are no classes to agree on."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)["out"][:, :1]


def test_an_output_without_classes_is_judged_by_its_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = Depth().eval()
    module = module_of(model)
    trainer(tmp_path).fit(module, datamodule=data_of(model))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher_agreement"] is summary["student_top1"] is None
    images = tiny_images(30, seed=2)
    with torch.no_grad():
        teacher, student = model(images), module(images)
    expected = 10 * torch.log10(teacher.square().sum() / (student - teacher).square().sum())
    assert summary["student_sqnr_db"] == pytest.approx(float(expected), abs=1e-3)
    assert summary["student_sqnr_db"] >= summary["nearest_sqnr_db"] > 0
    assert "output SQNR dB" in capsys.readouterr().out


def test_images_of_another_size_than_was_captured_are_refused_before_anything_long(tmp_path: Path) -> None:
    module = module_of(vit())
    images = torch.randn(40, 3, 12, 12)
    data = CalibrationDataModule.from_loaders(images.split(20), calibration_samples=40)
    with pytest.raises(PTQError, match=r"images have shape \(3, 12, 12\).*captured.*\(3, 8, 8\)"):
        trainer(tmp_path).fit(module, datamodule=data)


@pytest.mark.parametrize(("label", "wrong"), [(-1, None), (255, None), (7, "label 7")])
def test_pixels_without_a_label_do_not_count_and_unknown_ones_are_refused(
    tmp_path: Path, label: int, wrong: str | None
) -> None:
    torch.manual_seed(0)
    model, images = Dense().eval(), tiny_images(30, seed=2)
    with torch.no_grad():
        labels = model(images)["out"].argmax(1)
    labels[:, :2] = label
    loader = DataLoader(TensorDataset(images, labels[:, None]), batch_size=15)  # (N, 1, H, W), as image files give it
    data = CalibrationDataModule.from_loaders(tiny_images(40).split(20), loader, calibration_samples=40)
    if wrong:
        with pytest.raises(PTQError, match=wrong):
            trainer(tmp_path).fit(module_of(model), datamodule=data)
    else:
        trainer(tmp_path).fit(module_of(model), datamodule=data)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["teacher_miou"] == pytest.approx(100.0)
        assert summary["teacher_top1"] == 100.0
