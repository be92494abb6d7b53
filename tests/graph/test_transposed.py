"""Transposed convolutions against torch's own in double precision, and scales against a loop over output channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ptq import QuantConfig
from lightning_ptq.calibration import estimate_ranges
from lightning_ptq.functional import swap_channels
from lightning_ptq.graph import ChainPair, build_chain
from lightning_ptq.graph.arithmetic import counts_of
from lightning_ptq.quantizers import ActQuantizer
from tests.graph.test_fold import randomise
from tests.helpers import tiny_images

KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def randomised(model: nn.Module) -> nn.Module:
    model = randomise(model)  # type: ignore[no-untyped-call]
    return model.double()


def assert_quantized_and_equal(model: nn.Module, x: Tensor, layers: int, **how: Any) -> ChainPair:
    """All layers are quantized, nothing is left over, and without ranges the student computes what the model does."""
    pair = build_chain(model, QuantConfig(), "layer", **how)
    assert len(pair.layers) == layers
    assert pair.floats == ()
    with torch.no_grad():
        for chain in (pair.teacher, pair.student):
            torch.testing.assert_close(chain(x), model(x), rtol=1e-10, atol=1e-10)
    return pair


@pytest.mark.parametrize("groups", [1, 2])
def test_a_weight_is_laid_out_as_a_convolutions_and_back(groups: int) -> None:
    weight = torch.randn(4, 3, 2, 2)  # (I, O / groups, ...)
    laid_out = swap_channels(weight, groups)
    assert laid_out.shape == (3 * groups, 4 // groups, 2, 2)
    for i in range(4):
        for j in range(3):
            group, within = divmod(i, 4 // groups)
            assert torch.equal(laid_out[group * 3 + j, within], weight[i, j])
    assert torch.equal(swap_channels(laid_out, groups), weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_what_lies_behind_is_folded_as_the_fp64_model_has_it(dims: int, groups: int, bias: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            how = {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2, "groups": groups, "bias": bias}
            self.up, self.norm = KINDS[dims](4, 8, 3, **how), NORMS[dims](8)  # type: ignore[arg-type]
            self.gain = nn.Parameter(torch.randn(8, *[1] * dims))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.up(x)) * self.gain

    model = randomised(Net())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_quantized_and_equal(model, torch.randn(2, 4, *[5] * dims, dtype=torch.float64), 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Functions(nn.Module):
    """Transposed convolutions as functions and as modules, one of them called twice."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict = strict
        self.first, self.second = nn.Parameter(torch.randn(3, 2, 3, 3)), nn.Parameter(torch.randn(4, 6, 2))
        self.norm, self.twice = nn.BatchNorm2d(6), nn.ConvTranspose1d(6, 6, 3, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        if self.strict and x.shape[1] != 3:  # fx can't follow this
            raise ValueError(x.shape)
        x = F.conv_transpose2d(x, self.first, None, (2, 1), 1, output_padding=(1, 0), groups=1)
        x = F.conv_transpose1d(torch.cat([x, x], 1).flatten(2), self.second, stride=2, groups=1, dilation=2)
        x = self.twice(self.twice(x))
        return self.norm(x[..., None])


@pytest.mark.parametrize("exported", [False, True])
def test_functions_with_weights_are_layers_too_however_they_were_captured(exported: bool) -> None:
    model, x = randomised(Functions(exported)), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    pair = build_chain(model, QuantConfig(), "layer", image_shape=(3, 5, 6))
    assert (pair.student.image_shape is not None) == exported
    assert [layer.kind for layer in pair.layers] == ["ConvTranspose"] * 4
    with torch.no_grad():
        torch.testing.assert_close(pair.student(x), model(x), rtol=1e-10, atol=1e-10)


class Sized(nn.Module):
    """Asks for the size of its input, as a node, as a list and as a fixed one; batch norms behind."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up1 = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 6, 3, 2, 1)
        self.up2, self.up3 = nn.ConvTranspose2d(9, 4, 3, (3, 1), groups=1), nn.ConvTranspose2d(4, 2, 2, 2)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.up1(self.down(x), output_size=x.size())))
        y = torch.cat([x, y], 1)
        y = self.norm2(self.up2(y, [3 * y.shape[2] + 1, y.shape[3] + 2]))
        return self.up3(input=y, output_size=None)


@pytest.mark.parametrize("shape", [(7, 8), (8, 7), (5, 5)])
def test_a_size_that_is_asked_for_is_met_by_a_layer_of_one_input(shape: tuple[int, int]) -> None:
    model, x = randomised(Sized()), torch.randn(2, 3, *shape, dtype=torch.float64)
    assert_quantized_and_equal(model, x, 4)


def test_with_placement_for_hardware_a_size_is_no_tensor_to_quantize() -> None:
    model, x = randomised(Sized()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pair = build_chain(model, QuantConfig(placement="hardware", weight_symmetric=True), "layer")
    quantized = {name.rpartition(".")[2] for name, m in pair.student.named_modules() if isinstance(m, ActQuantizer)}
    # No sizes, and no slice: it shares the quantizer of what it is cut from.
    assert quantized == {"act_x", "act_down", "act_up1", "act_relu", "act_cat", "act_up2"}
    torch.testing.assert_close(pair.student(x), model(x), rtol=1e-10, atol=1e-10)


def test_sizes_that_alone_forbid_to_cut_are_captured_as_numbers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 3, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(torch.relu(self.down(x)), output_size=x.size())

    model, x = randomised(Net()), torch.randn(2, 3, 8, 7, dtype=torch.float64)
    pair = assert_quantized_and_equal(model, x, 2, image_shape=(3, 8, 7))
    assert pair.student.names == ("down", "up")


def test_a_fixed_size_is_met() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(3, 4, 3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=(22,))

    model, x = randomised(Net()), torch.randn(2, 3, 5, dtype=torch.float64)
    assert_quantized_and_equal(model, x, 1)


def test_a_layer_whose_weight_is_read_elsewhere_stays_as_it_is() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.conv(x)) * self.up.weight

    model, x = randomised(Net()), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    pair = build_chain(model, QuantConfig(), "layer")
    torch.testing.assert_close(pair.student(x), model(x), rtol=1e-10, atol=1e-10)
    assert {op.name: op.reason for op in pair.floats} == {
        "up": "ConvTranspose2d: its weight is also read by other operations",
        "up.weight": "parameter used directly by 'mul' stays in float",
    }


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("per", ["channel", "tensor"])
@torch.no_grad()
def test_every_output_channel_has_a_scale_of_its_own_whatever_the_groups(groups: int, per: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(6, 9, 3, stride=2, groups=groups)).eval()
    layer, x = model[0], torch.randn(8, 6, 4, 4)
    layer.weight.mul_(torch.rand(6, 9 // groups, 1, 1) + 0.1)
    quant = QuantConfig(3, 8, edges="same", weight_range="minmax", weight_per=per)
    student = build_chain(model, quant, "layer").student
    estimate_ranges(student, x, quant, torch.device("cpu"), lambda t: t[None])

    weight, inputs, outputs = layer.weight.clone(), 6 // groups, 9 // groups
    for channel in range(9):
        group, j = divmod(channel, outputs)
        mine = weight[group * inputs : (group + 1) * inputs, j]  # torch's layout: (I, O / groups, ...)
        over = mine if per == "channel" else layer.weight
        scale = (over.max().clamp(min=0) - over.min().clamp(max=0)) / 7
        zero = (-over.min().clamp(max=0) / scale).round()
        mine.copy_((((mine / scale).round() + zero).clamp(0, 7) - zero) * scale)
    (act,) = (q for name, q in student.units[0].named_modules() if name.startswith("act"))
    expected = F.conv_transpose2d(act(x), weight, layer.bias, 2, groups=groups)
    torch.testing.assert_close(student(x), expected)


def test_multiply_adds_are_those_of_every_input_position() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, 2, groups=2))
    counts = counts_of(build_chain(model.eval(), QuantConfig(), "layer").student, (3, 8, 8)).multiply_adds
    assert counts == {"0": 8 * 8 * 3 * 4 * 9, "2": 17 * 17 * 4 * 3 * 4}


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_between_transposed_convolutions_can_be_rescaled(groups: int) -> None:
    from lightning_ptq.equalize import equalize

    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 8, 3, groups=groups)
    up.weight.data.mul_(torch.logspace(-1, 1, 8 // groups).view(1, -1, 1, 1))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), up, nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, groups=groups))
    quant = QuantConfig(pairs="smooth")
    x, student = tiny_images(16), build_chain(model.eval(), quant, "layer").student
    assert [(pair.source, pair.layers) for pair in student.pairs] == [("0", ("2",)), ("2", ("4",))]
    before = student.find("2").weight.clone()  # type: ignore[operator,union-attr]
    equalize(student, x, quant, torch.device("cpu"), lambda t: [t])
    assert not torch.allclose(student.find("2").weight, before)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(student(x), model(x), rtol=1e-4, atol=1e-5)
