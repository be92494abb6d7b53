"""The integer model computes what the student does, from integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQError, QuantConfig
from lightning_ptq.calibration import estimate_ranges
from lightning_ptq.convert import OPS, convert
from lightning_ptq.graph import Chain, build_chain
from lightning_ptq.quantizers import act_quantizers, weight_quantizers
from lightning_ptq.weights import AdaRound
from tests.helpers import tiny_images, tiny_net

CPU = torch.device("cpu")


def calibrated(net: nn.Module, quant: QuantConfig, x: Tensor, rounding: str = "adaround", **how: Any) -> Chain:
    """A student with ranges, and everything that calibration may change changed at random."""
    student = build_chain(net.eval(), quant, "block", rounding=rounding, **how).student
    estimate_ranges(student, x, quant, CPU, lambda t: t[None])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for q in weight_quantizers(student):
            q.log_gain.normal_(0, 0.05, generator=generator)
            q.bias_shift.normal_(0, 0.1, generator=generator)
            if isinstance(q, AdaRound):
                q.alpha.add_(torch.randn(q.alpha.shape, generator=generator))
        for act in act_quantizers(student):
            act.log_scale.add_(0.1 * torch.randn((), generator=generator))
            act._mirror()
    return student


def assert_same(student: Chain, x: Tensor) -> None:
    """Equal, but for a few elements that lie in the middle between two integers."""
    with torch.no_grad():
        expected, actual = student(x), convert(student)(x)
    assert float(((actual - expected).abs() > 1e-5 * expected.abs().max()).float().mean()) < 0.01


class Layers(nn.Module):
    """Every kind of layer and of padding, a product of activations, a norm, a constant, and layers without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, stride=2, padding=1, padding_mode="reflect", bias=False)
        self.b = nn.Conv2d(6, 6, 3, padding="same", dilation=2, groups=3)
        self.c = nn.Conv1d(6, 8, 3)
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8, bias=False)
        self.place, self.head = nn.Parameter(torch.randn(1, 14, 8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(torch.relu(self.b(self.a(x))).flatten(2)).transpose(1, 2)  # (N, 14, 8)
        x = self.fc(self.norm(x + self.place))
        x = torch.softmax(x @ x.transpose(1, 2), -1) @ x
        return self.head(x.mean(1))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 2), (4, 4), (8, 8), (3, 16)])
def test_the_integer_model_computes_what_the_student_does(
    weight_bits: int, act_bits: int, per: Any, symmetric: bool
) -> None:
    torch.manual_seed(0)
    quant = QuantConfig(weight_bits, act_bits, weight_per=per, weight_symmetric=symmetric, act_symmetric=symmetric)
    x = tiny_images(32)
    assert_same(calibrated(tiny_net(), quant, x), x)
    assert_same(calibrated(Layers(), quant, x), x)


def test_conv3d_and_flexround_convert_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 27, 3))
    x = torch.randn(16, 2, 5, 5, 5)
    assert_same(calibrated(net, QuantConfig(4, 4), x, rounding="flexround"), x)


def test_weights_are_integers_within_their_range_and_no_float_copy_is_left() -> None:
    student = calibrated(tiny_net(), QuantConfig(3, 4), tiny_images(32))
    model = convert(student)
    weights = {name: value for name, value in model.state_dict().items() if name.endswith(".weight")}
    assert set(weights) == {"stem.weight", "fc.weight"} | {
        f"blocks.{i}.{conv}.weight" for i in (0, 1) for conv in ("conv1", "conv2")
    }
    for name, weight in weights.items():
        assert weight.dtype == torch.uint8
        assert int(weight.max()) <= (255 if name in ("stem.weight", "fc.weight") else 7)
    layer = student.find("blocks.0.conv1")
    assert torch.equal(weights["blocks.0.conv1.weight"].float(), layer.weight_quantizer.integers(layer.weight))  # type: ignore[operator,union-attr]
    targets = [node.target for node in model.graph.nodes if node.op == "call_function"]
    quantized = targets.count(OPS.quantize_per_tensor.default)
    assert quantized == len(act_quantizers(student)) == targets.count(OPS.dequantize_per_tensor.default)
    assert targets.count(OPS.dequantize_per_channel.default) == len(weight_quantizers(student))


@torch.no_grad()
def test_every_units_output_can_be_looked_at() -> None:
    x = tiny_images(8)
    student = calibrated(tiny_net(), QuantConfig(8, 8), x)
    outputs = convert(student, every_unit=True)(x)
    assert len(outputs) == len(student)
    for stop, output in enumerate(outputs, 1):
        torch.testing.assert_close(output, student(x, stop=stop))


def test_a_part_gives_its_outputs_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"low": self.b(y := self.a(x)), "high": y}

    x = tiny_images(8)
    student = calibrated(Two(), QuantConfig(8, 8), x, is_part=True)
    with torch.no_grad():
        outputs = convert(student)(x)
        packed = student(x)
    assert list(outputs) == ["low", "high"]
    torch.testing.assert_close(packed[:, :5, :16], outputs["low"].flatten(2))


def test_what_is_not_calibrated_or_for_simulation_only_is_refused() -> None:
    student = build_chain(tiny_net(), QuantConfig(), "block").student
    with pytest.raises(PTQError, match=r"units 'stem', 'blocks.0', 'blocks.1', 'fc' have no ranges"):
        convert(student)
    x = tiny_images(32)
    student = calibrated(tiny_net(), QuantConfig(), x)
    next(q for q in weight_quantizers(student.units[2])).enabled = False
    with pytest.raises(PTQError, match=r"units 'blocks.1' have no ranges"):
        convert(student)
    with pytest.raises(PTQError, match="softmax='log2' is simulation only"):
        convert(calibrated(Layers(), QuantConfig(softmax="log2"), x))
