"""Biases steer clear of values that sums in another order would round differently."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQModule, QuantConfig
from lightning_ptq.quantizers import ActQuantizer
from lightning_ptq.ties import _MOVES, few_bit_quantizers, first_least, layer_before, steer_clear, ties
from tests.helpers import tiny_data, tiny_images, tiny_module, trainer

CPU = torch.device("cpu")


def read_by_quantizers(module: PTQModule, x: Tensor) -> dict[str, tuple[ActQuantizer, Tensor]]:
    """Every activation quantizer of the student and what it reads in a plain pass."""
    found: dict[str, tuple[ActQuantizer, Tensor]] = {}
    student = deepcopy(module.student)
    for name, q in student.named_modules():
        if isinstance(q, ActQuantizer):
            q.register_forward_pre_hook(lambda q, args, name=name: found.update({name: (q, args[0])}))
    with torch.no_grad():
        student(x)
    return found


def on_a_tie(q: ActQuantizer, x: Tensor) -> int:
    """Values within the grid that lie in the middle between two integers, but for a hundred-thousandth of a step."""
    steps = x.double() / float(q.scale)
    low, high = q.qmin - float(q.zero_point), q.qmax - float(q.zero_point)
    return int((((steps % 1) - 0.5).abs() < 1e-5)[(steps > low) & (steps < high)].sum())


@pytest.fixture
def module(tmp_path: Path) -> PTQModule:
    module = tiny_module(QuantConfig(3, 3), method="nearest")
    trainer(tmp_path).fit(module, datamodule=tiny_data())
    return module


def test_a_value_that_turns_up_everywhere_is_moved_off_its_tie(module: PTQModule) -> None:
    images = tiny_images(8).mean((2, 3), keepdim=True).expand(8, 3, *tiny_images(1).shape[2:]).contiguous()
    planted = 0
    x = images
    for unit in module.student.units:
        with torch.no_grad():
            for q, layer, _ in few_bit_quantizers(unit, x):  # type: ignore[arg-type]
                read: list[Tensor] = []
                hook = q.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
                unit(x)
                hook.remove()
                values, counts = read[0][:, 0].unique(return_counts=True)
                counts[(values <= 0.3 * q.scale) | (values > 6 * q.scale)] = 0
                if counts.any():
                    value = values[counts.argmax()]
                    tie = ((value / q.scale).floor() + 0.5) * q.scale
                    layer.weight_quantizer.bias_shift[0] += tie - value
                    planted += 1
            x = unit(x)
    assert planted >= 3
    before = read_by_quantizers(module, images)
    assert sum(on_a_tie(*found) for found in before.values()) > 20
    state = {name: value.clone() for name, value in module.student.state_dict().items()}
    steer_clear(module.student, images, CPU, lambda x: x)
    after = read_by_quantizers(module, images)
    assert sum(on_a_tie(*found) for found in after.values()) == 0
    steps = max(float(q.scale) for q, _ in after.values())
    for name, value in module.student.state_dict().items():
        if not name.endswith("bias_shift"):
            assert torch.equal(value, state[name])
        assert float((value.float() - state[name].float()).abs().max()) < 1e-3 * steps
    with torch.no_grad():
        single, double = module.student(images), deepcopy(module.student).double()(images.double())
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_what_has_no_ties_stays_as_it_is(module: PTQModule) -> None:
    images = tiny_images(8, seed=5)
    read = read_by_quantizers(module, images)
    few = {name: found for name, found in read.items() if found[0].bits < 8}
    assert few
    assert not any(on_a_tie(*found) for found in few.values())
    state = {name: value.clone() for name, value in module.student.state_dict().items()}
    steer_clear(module.student, images, CPU, lambda x: x)
    assert all(torch.equal(value, state[name]) for name, value in module.student.state_dict().items())


def test_counts_are_those_of_a_plain_loop(module: PTQModule) -> None:
    q = next(q for q, _ in read_by_quantizers(module, tiny_images(2)).values() if q.bits == 3)
    steps = torch.tensor([[0.5, 1.5, 1.5001, 2.4999], [0.4997, 3.0, 9.5, 2.4995]])[:, :, None, None]
    x = steps * q.scale
    expected = [[0] * 4 for _ in _MOVES]
    for row in range(2):
        for channel in range(4):
            value = x[row, channel].double().item() / q.scale.double().item()
            for move, count in zip(_MOVES, expected, strict=True):
                shifted = value + move
                if value < 7.0 and abs(shifted - round(shifted - 0.5) - 0.5) < 3e-5:  # 9.5 is beyond the grid
                    count[channel] += 1
    counts = ties(x, q, 1)
    assert counts.tolist() == expected
    assert sum(map(sum, expected)) == 6
    assert [_MOVES[0], *map(abs, _MOVES[1:3])] == [0.0, 1e-4, 1e-4]
    assert first_least(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0], [0.0, 0.0, 1.0]])).tolist() == [1, 0, 2]


class Gated(nn.Module):
    """A sum of one channel with eight, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.branch = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 8, 1)
        self.behind = nn.Conv2d(8, 8, 1)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.behind((self.gate(x) + self.branch(x)).relu())
        return self.b(self.a(x.mean((2, 3))).relu())


@pytest.mark.parametrize("granularity", ["block", "net"])
def test_a_channel_that_a_sum_spreads_over_several_is_left_alone(tmp_path: Path, granularity: Any) -> None:
    torch.manual_seed(0)
    module = PTQModule(
        Gated().eval(), QuantConfig(3, 3, edges="same"), "nearest", granularity=granularity, batch_size=8
    )
    trainer(tmp_path).fit(module, datamodule=tiny_data())
    few = [found for found in read_by_quantizers(module, tiny_images(40)).values() if found[0].bits == 3]
    assert len(few) == 5, "of the images, and of what the layers read"
    gate = next(m for name, m in module.student.named_modules() if name.endswith("gate"))
    assert not gate.weight_quantizer.bias_shift.any()  # type: ignore[operator,union-attr]


def test_biases_of_sums_and_behind_relu_are_found(module: PTQModule) -> None:
    found = {}
    for unit in module.student.units:
        for node in unit.graph.nodes:  # type: ignore[operator,union-attr]
            if node.op == "call_module" and isinstance(unit.get_submodule(str(node.target)), ActQuantizer):
                layer = layer_before(unit, node.all_input_nodes[0])  # type: ignore[arg-type]
                found[str(node.target)] = layer
    names = {m: name for unit in module.student.units for name, m in unit.named_modules()}
    layers = {names[layer] for layer in found.values() if layer is not None}
    assert {"stem", "blocks.0.conv1", "blocks.0.conv2"} <= layers
