"""Functions with fixed weights become modules that compute the same and are quantized; constants are computed once."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from lightning_ptq.config import QuantConfig
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.arithmetic import multiply_adds


class Functional(nn.Module):
    """Convolution, batch norm, products and layer norm as functions of parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.shift = nn.Parameter(torch.randn(6))
        self.second = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.gain, self.matrix = nn.Parameter(torch.rand(4)), nn.Parameter(torch.randn(4, 7))
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        x = F.conv2d(x, self.first, self.shift, stride=2, padding=1)
        weight = self.second - self.second.mean((1, 2, 3), keepdim=True)  # standardised
        x = F.relu(F.batch_norm(F.conv2d(x, weight, groups=2, padding="same"), self.mean, self.var, self.gain))
        x = F.layer_norm(x.mean((2, 3)), (4,), self.gain)
        return F.linear(self.head(x @ self.matrix), self.head.weight.t().contiguous()[:5])


def test_functions_with_weights_are_layers_and_constants_are_folded():
    torch.manual_seed(0)
    model, x = Functional().eval().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pair = build_chain(model, QuantConfig(), "layer")
    torch.testing.assert_close(pair.teacher(x), model(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pair.student(x), model(x), rtol=1e-10, atol=1e-10)
    assert [plan.kind for plan in pair.layers] == ["Conv2d", "Conv2d", "Linear", "Linear", "Linear"]
    assert len({plan.name for plan in pair.layers}) == 5
    assert [op.reason for op in pair.floats] == ["LayerNorm is kept in float"]
    left = [n for unit in pair.student.units for n in unit.graph.nodes if n.op == "get_attr"]
    assert left == []
    assert multiply_adds(pair.student, (3, 8, 8)) == (6 * 27 * 16 + 4 * 27 * 16 + 4 * 7 + 7 * 5 + 5 * 5,) * 2


def test_a_layer_that_is_also_used_as_a_function_keeps_its_own_bias():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.fc(x), self.fc.weight)

    model, x = Net().eval(), torch.randn(3, 4)
    pair = build_chain(model, QuantConfig(), "layer")
    torch.testing.assert_close(pair.student(x), model(x))
    assert [plan.name for plan in pair.layers] == ["fc", "fc__1"]


@pytest.mark.parametrize("function", [lambda x: F.linear(x, x), lambda x: F.layer_norm(x, (4,)), lambda x: x @ x.t()])
def test_functions_without_fixed_weights_stay_functions(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return function(self.fc(x))

    model, x = Net().eval(), torch.randn(4, 4)
    pair = build_chain(model, QuantConfig(), "net")
    torch.testing.assert_close(pair.student(x), model(x))
    (unit,) = pair.student.units
    assert isinstance(unit, fx.GraphModule)
    assert [n.target for n in unit.graph.nodes if n.op == "call_module" and "act" not in n.target] == ["fc"]


def test_a_fixed_filter_is_no_layer():
    class Blur(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("kernel", torch.ones(4, 1, 3, 3) / 9)

        def forward(self, x):
            return F.conv2d(self.conv(x), self.kernel.repeat(1, 1, 1, 1), groups=4)

    pair = build_chain(Blur().eval(), QuantConfig(), "layer")
    assert [plan.name for plan in pair.layers] == ["conv"]
    assert [op.name for op in pair.floats] == ["conv2d"]


def test_a_shape_that_is_computed_does_no_harm():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            x = torch.permute(self.fc(x), dims=(0, 1))
            return F.layer_norm(x, (x.shape[-1],), self.norm.weight, self.norm.bias)

    model, x = Net().eval(), torch.randn(3, 4)
    torch.testing.assert_close(build_chain(model, QuantConfig(), "net").student(x), model(x))
