"""A small U-Net with transposed convolutions goes the whole way: trace, calibration, and every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_ptq as ptq
from lightning_ptq import PTQModule, QuantConfig
from lightning_ptq.convert import OPS, convert
from lightning_ptq.functional import swap_channels
from lightning_ptq.graph import build_chain
from tests.graph.test_fold import randomise
from tests.helpers import tiny_images, trainer
from tests.test_bias import layer_outputs
from tests.test_convert import assert_same, calibrated

HARDWARE = QuantConfig(8, 8, placement="hardware", weight_symmetric=True)


class UNet(nn.Module):
    """Two steps down, two up: plain, with groups to the size of what is skipped, and depthwise; batch norms behind."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.norm0 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.down1, self.norm1 = nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.down2, self.norm2 = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.up1, self.norm3 = nn.ConvTranspose2d(12, 8, 2, 2, bias=False), nn.BatchNorm2d(8)
        self.up2, self.norm4 = nn.ConvTranspose2d(16, 6, 3, 2, 1, groups=2), nn.BatchNorm2d(6)
        self.smooth, self.head = nn.ConvTranspose2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.norm0(self.start(x)))  # 8x8
        b = torch.relu(self.norm1(self.down1(a)))  # 4x4
        c = torch.relu(self.norm2(self.down2(b)))  # 2x2
        c = torch.cat([b, torch.relu(self.norm3(self.up1(c)))], 1)
        c = torch.cat([a, torch.relu(self.norm4(self.up2(c, output_size=a.shape[-2:])))], 1)
        return self.head(torch.relu(self.smooth(c)))


def unet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(UNet())  # type: ignore[no-any-return,no-untyped-call]


def fitted(folder: Path, quant: QuantConfig, **changes: Any) -> ptq.PTQModule:
    settings: dict[str, Any] = {"method": "qdrop", "steps_per_unit": 6, "network_steps": 0, "batch_size": 8, "seed": 3}
    module = ptq.PTQModule(unet(), quant, **(settings | changes))
    data = ptq.CalibrationDataModule.from_loaders(tiny_images(32).split(16), calibration_samples=32)
    trainer(folder).fit(module, datamodule=data)
    return module.eval()


@pytest.mark.parametrize("placement", ["paper", "hardware"])
def test_everything_is_folded_and_quantized(placement: Any) -> None:
    model, x = unet().double(), tiny_images(4).double()
    pair = build_chain(model, QuantConfig(placement=placement, weight_symmetric=True), "block")
    assert [layer.name for layer in pair.layers] == ["start", "down1", "down2", "up1", "up2", "smooth", "head"]
    assert pair.floats == ()
    with torch.no_grad():
        torch.testing.assert_close(pair.student(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["qdrop", "adaround", "flexround"])
def test_calibration_brings_it_closer_than_nearest(tmp_path: Path, method: Any) -> None:
    x, quant = tiny_images(32), QuantConfig(2, 8)
    module = fitted(tmp_path, quant, method=method, steps_per_unit=100)
    plain = fitted(tmp_path / "plain", quant, method="nearest")
    with torch.no_grad():
        errors = [float((network.student(x) - network.teacher(x)).square().mean()) for network in (module, plain)]
    assert errors[0] < 0.9 * errors[1]
    assert module.reports[1].accepted
    for name in ("up1", "up2"):
        up = module.student.find(name)
        assert up.weight_quantizer.flipped(up.weight)  # type: ignore[operator,union-attr]
        assert all(p.any() for p in up.weight_quantizer.corrections) == (method != "adaround")  # type: ignore[union-attr]


def test_bias_correction_gives_every_channel_the_teachers_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PTQModule, "_finish_biases", lambda _: None)  # which rounds them as kernels do
    module, names = fitted(tmp_path, QuantConfig(2, 8), method="nearest", corrections=True), ["up1", "up2", "smooth"]
    assert [report.accepted for report in module.reports[1:]] == [True] * 3
    wanted, found = (layer_outputs(chain, names, tiny_images(32)) for chain in (module.teacher, module.student))
    for name in names:
        means = [outputs[name].mean((0, 2, 3)) for outputs in (wanted, found)]
        torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("quant", [QuantConfig(2, 2), QuantConfig(8, 8), HARDWARE])
def test_the_integer_model_computes_what_the_student_does(quant: QuantConfig, per: Any) -> None:
    x = tiny_images(32)
    student = calibrated(unet(), QuantConfig(**(quant.to_dict() | {"weight_per": per})), x)
    assert_same(student, x)
    layer, model = student.find("up1"), convert(student)
    integers: Tensor = layer.weight_quantizer.integers(layer.weight)  # type: ignore[operator,union-attr]
    assert torch.equal(model.get_buffer("up1.weight").float(), swap_channels(integers, 1))  # as torch has it
    if per == "channel":
        targets = [node for node in model.graph.nodes if node.target is OPS.dequantize_per_channel.default]
        assert [node.args[3] for node in targets if str(node.args[0]).startswith("up1")] == [1]


@pytest.mark.parametrize("quant", [QuantConfig(2, 2), QuantConfig(4, 4, average_bits=3.0), HARDWARE])
def test_every_file_does_what_the_simulation_does(tmp_path: Path, quant: QuantConfig) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = fitted(tmp_path, quant)
    for export, name in ((ptq.export_onnx, "model.onnx"), (ptq.export_pt2, "model.pt2")):
        report = export(module, tmp_path / name)
        assert report.passed, report.text()
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    assert [node.op_type for node in nodes].count("ConvTranspose") == 3
    (weight,) = (node for node in nodes if node.op_type == "DequantizeLinear" and node.input[0] == "up1.weight")
    assert [a.i for a in weight.attribute if a.name == "axis"] == [1]
    # What has groups is laid out behind its scales, but for what is depthwise.
    assert [node.op_type for node in nodes].count("Transpose") == 1
    ptq.save_packed(module, tmp_path / "model.ptq")
    x = tiny_images(20, seed=7)
    with torch.no_grad():
        assert torch.equal(ptq.load_packed(tmp_path / "model.ptq", UNet().eval())(x), module(x))
