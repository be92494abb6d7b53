"""Biases steer clear of values that sums in another order would round differently."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_ptq import PTQModule, QuantConfig
from lightning_ptq.quantizers import ActQuantizer
from lightning_ptq.ties import few_bit_quantizers, first_least, layer_before, steer_clear, ties
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
            for q, layer, read in few_bit_quantizers(unit, x):  # type: ignore[arg-type]
                values, counts = read[:, 0].unique(return_counts=True)
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
    moved = {name for name, value in module.student.state_dict().items() if not torch.equal(value, state[name])}
    assert all(name.endswith("bias_shift") for name in moved)
    again = {name: value.clone() for name, value in module.student.state_dict().items()}
    steer_clear(module.student, images, CPU, lambda x: x)
    assert all(torch.equal(value, again[name]) for name, value in module.student.state_dict().items())


def test_counts_are_those_of_a_plain_loop(module: PTQModule) -> None:
    q = next(q for q, _ in read_by_quantizers(module, tiny_images(2)).values() if q.bits == 3)
    steps = torch.tensor([[0.5, 1.5, 1.5001, 2.4999], [0.49995, 3.0, 9.5, 2.49993]])[:, :, None, None]
    counts = ties(steps * q.scale, q, 1)
    assert counts.shape == (17, 4)
    assert counts[0].tolist() == [1, 1, 0, 0]  # as it is; 9.5 is beyond the grid
    assert (counts.sum(0) <= 4).all()
    assert first_least(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0], [0.0, 0.0, 1.0]])).tolist() == [1, 0, 2]


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
