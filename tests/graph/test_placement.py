"""Which tensors get a quantizer, with how many bits, and what is reported as float."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ptq.config import QuantConfig
from lightning_ptq.errors import PTQError
from lightning_ptq.graph import build_chain
from lightning_ptq.models import resnet20
from lightning_ptq.quantizers import ActQuantizer


def quantizers(chain):
    return {name.split(".", 2)[2]: m for name, m in chain.named_modules() if isinstance(m, ActQuantizer)}


class Residual(nn.Module):
    """Two branches of convolutions over one tensor, then a convolution that only feeds an addition."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.left(x) + self.right(x) + x + F.max_pool2d(x, 3, 1, 1)
        return self.fc(x.mean((2, 3)))


@torch.no_grad()
def test_a_tensor_is_quantized_once_for_all_its_readers():
    pair = build_chain(Residual().eval(), QuantConfig(), "net")
    assert list(quantizers(pair.student)) == ["act_x", "act_relu", "act_mean"]
    assert not quantizers(pair.teacher)
    (unit,) = pair.student.units
    relu = next(node for node in unit.graph.nodes if node.name == "relu")
    assert [reader.name for reader in relu.users] == ["act_relu"]
    readers = {reader.name for node in unit.graph.nodes if node.name == "act_relu" for reader in node.users}
    assert readers == {"left", "right", "add_1", "max_pool2d"}


def test_residual_inputs_are_quantized_once_after_the_addition():
    pair = build_chain(resnet20().eval(), QuantConfig(), "block")
    # image, stem, 9 blocks with one inner and one outer tensor; the last outer one is read by pooling instead
    assert len(quantizers(pair.student)) == 1 + 1 + 9 * 2 - 1 + 1


def test_edges_are_eight_bit_or_the_same_and_overrides_win():
    def bits(**options):
        pair = build_chain(Residual().eval(), QuantConfig(weight_bits=3, act_bits=4, **options), "layer")
        return {plan.name: (plan.weight_bits, plan.act_bits) for plan in pair.layers}, quantizers(pair.student)

    found, acts = bits()
    assert found == {"stem": (8, 8), "left": (3, 4), "right": (3, 4), "fc": (8, 8)}
    assert {name: act.bits for name, act in acts.items()} == {"act_x": 8, "act_relu": 4, "act_mean": 8}
    found, _ = bits(edges="same")
    assert set(found.values()) == {(3, 4)}
    # One quantizer, two readers: the wider request counts for both.
    found, acts = bits(overrides={"r*": {"weight_bits": 2, "act_bits": 6}, "fc": {"weight_bits": 5}})
    assert found == {"stem": (8, 8), "left": (3, 6), "right": (2, 6), "fc": (5, 8)}
    assert acts["act_relu"].bits == 6


def test_every_layer_without_a_layer_before_it_is_a_first_one():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(3, 3, 1) for _ in range(5))

        def forward(self, x):
            y = self.c(self.a(x) + self.b(x).relu())
            return torch.cat([self.d(y), self.e(y)], 1)

    pair = build_chain(Net().eval(), QuantConfig(), "net")
    assert {plan.name: plan.weight_bits for plan in pair.layers} == {"a": 8, "b": 8, "c": 4, "d": 8, "e": 8}


def test_an_override_that_matches_no_layer_is_refused():
    with pytest.raises(PTQError, match=r"'layer9\.\*' matches none"):
        build_chain(Residual().eval(), QuantConfig(overrides={"layer9.*": {"act_bits": 8}}), "layer")


def test_nothing_to_quantize_is_refused():
    with pytest.raises(PTQError, match="no layer that can be quantized"):
        build_chain(nn.Sequential(nn.ReLU(), nn.Flatten()).eval(), QuantConfig(), "layer")


def test_what_stays_in_float_is_listed_with_a_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.norm = nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.LayerNorm(4)
            self.weight, self.gain = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))

        def forward(self, x):
            x = self.act(self.conv(x)).mean((2, 3))
            x = F.linear(self.norm(x), self.weight).relu() * self.gain
            return x @ torch.matmul(self.weight, self.weight @ torch.addmm(x, x, x.transpose(0, 1)))

    pair = build_chain(Net().eval(), QuantConfig(), "layer")
    assert {op.name: op.reason for op in pair.floats} == {
        "act": "PReLU is not supported and stays in float",
        "norm": "LayerNorm is kept in float",
        "gain": "parameter used directly by 'mul' stays in float",
        "addmm": "addmm is not quantized",
        "weight": "parameter used directly by 'matmul' stays in float",
        "matmul": "matmul is not quantized",
        "matmul_1": "matmul is not quantized",
    }


def test_quantizer_names_do_not_collide_with_the_models():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act_x = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.act_x(x)

    model, x = Net().eval(), torch.randn(1, 3, 2, 2)
    pair = build_chain(model, QuantConfig(), "layer")
    assert list(quantizers(pair.student)) == ["act_x_"]
    assert torch.equal(pair.student(x), model(x))


def test_teacher_and_student_share_frozen_weights():
    pair = build_chain(resnet20().eval(), QuantConfig(), "block", rounding="adaround")
    teacher, student = dict(pair.teacher.named_parameters()), dict(pair.student.named_parameters())
    assert set(teacher) <= set(student)
    for name, parameter in teacher.items():
        assert parameter is student[name]
        assert not parameter.requires_grad
    assert not any(module.training for chain in (pair.teacher, pair.student) for module in chain.modules())
