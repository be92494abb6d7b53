"""Tracing: what is refused and what the message says, what is rewritten before anything else."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ptq.config import QuantConfig
from lightning_ptq.errors import PTQError
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.trace import TraceError, node_kinds, trace


def build(model, **options):
    return build_chain(model, QuantConfig(), "layer", **options)


@torch.fx.wrap
def pick_sign(x):
    return x if x.sum() > 0 else -x


class Gate(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the offending line
            return x
        return -x


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.gate = Gate()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.gate(self.conv(x))
        return self.fc(x.mean((2, 3)))


def test_the_error_names_the_users_line_and_the_module_to_keep_whole():
    with pytest.raises(TraceError) as caught:
        trace(Gated().eval())
    message = str(caught.value)
    lines = Path(__file__).read_text().splitlines()
    number = 1 + next(i for i, line in enumerate(lines) if "# the offending line" in line)
    assert f"{__file__}:{number}" in message
    assert "if x.sum() > 0:" in message
    assert "control flow" in message
    assert "leaf_modules=['gate']" in message
    assert "torch.fx.wrap" in message
    assert caught.value.path == ("gate",)


def test_untraceable_line_of_the_model_itself_is_not_answered_with_a_leaf():
    class Net(Gated):
        def forward(self, x):
            return self.fc(self.conv(x)[:, :, 0, 0]) if x.sum() > 0 else x

    with pytest.raises(PTQError, match="move the line into a submodule"):
        build(Net().eval())


def test_the_way_out_works():
    model = Gated().eval()
    pair = build(model, leaf_modules=["gate"])
    x = torch.randn(2, 3, 6, 6)
    assert len(pair.student) == 2
    assert torch.equal(pair.student(x), model(x))

    class Net(Gated):
        def forward(self, x):
            return self.fc(pick_sign(self.conv(x)).mean((2, 3)))

    model = Net().eval()
    pair = build(model)
    assert torch.equal(pair.student(x), model(x))


def test_leaf_modules_pattern_without_a_match_is_refused():
    with pytest.raises(PTQError, match="'gatee' names no module"):
        build(Gated().eval(), leaf_modules=["gatee"])


def test_training_mode_is_refused_with_the_modules_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].train()
    with pytest.raises(PTQError, match=r"'1' \(BatchNorm2d\) is in training mode.*model\.eval\(\)"):
        build(model)
    with pytest.raises(PTQError, match=r"'0.weight' has no shape yet: a lazy module takes it from the first image"):
        build(nn.Sequential(nn.LazyConv2d(4, 3)).eval())
    with pytest.raises(PTQError, match="Sequential is in training mode"):
        build(model.train())


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.fc(x))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda y: (y, y), "tuple"),
        (lambda y: {"logits": (y, y)}, "tuple"),
        (lambda y: y.chunk(2), "tuple"),
        (lambda y: y.max(dim=1), "tuple"),
        (lambda y: y.shape, "scalar"),
        (lambda y: 3, "int"),
    ],
)
def test_an_output_that_is_not_one_tensor_is_refused(function, kind):
    with pytest.raises(PTQError, match=f"Returns returns a {kind}; a model to quantize returns one tensor"):
        build(Returns(function).eval())


def test_several_required_inputs_are_refused_and_optional_ones_keep_their_default():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, scale, mask=None):
            return self.fc(x * scale if mask is None else x * mask)

    with pytest.raises(PTQError, match=r"Net.forward needs 2 arguments \(x, scale\)"):
        build(Net().eval())

    class Optional(Net):
        def forward(self, x, scale=2.0, mask=None, **kwargs):
            return super().forward(x, scale, mask)

    model, x = Optional().eval(), torch.randn(2, 4)
    assert torch.equal(build(model).student(x), model(x))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: x.chunk(2), "tuple"),
        (lambda x: x.chunk(2)[0], "tensor"),
        (lambda x: torch.split(x, 1)[1:], "tuple"),
        (lambda x: torch.topk(x, 1).values, "opaque"),
        (lambda x: x.max(dim=1), "tuple"),
        (lambda x: torch.max(x, 1)[0], "tensor"),
        (lambda x: torch.max(x, x + 1), "tensor"),
        (lambda x: x.max(), "tensor"),
        (lambda x: x.size(0), "scalar"),
        (lambda x: x.shape[2] // 2 + 1, "scalar"),
        (lambda x: x * x.shape[1], "tensor"),
        (lambda x: x.view(x.size(0), -1), "tensor"),
        (lambda x: x.T, "tensor"),
        (lambda x: x[:, 1:], "tensor"),
        (lambda x: F.max_pool2d(x, 2), "tensor"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True), "tuple"),
        (lambda x: torch.cat([x, x]), "tensor"),
        (lambda x: pick_sign(x), "opaque"),
    ],
)
def test_what_a_node_computes_is_known_statically(function, kind):
    class Net(nn.Module):
        def forward(self, x):
            return function(x)

    gm = torch.fx.symbolic_trace(Net())
    assert node_kinds(gm)[gm.graph.output_node().args[0]] == kind


class InPlace(nn.Module):
    """Overwrites tensors in every way that fx can see, and reads some of them afterwards."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.dropout = nn.Dropout(inplace=True)

    def forward(self, x):
        x = self.relu(x)
        y = self.conv1(x)
        alias = self.dropout(y)
        z = F.relu(y, inplace=True)
        z = z + alias + y  # eager: both were overwritten
        z.mul_(2.0)
        w = self.conv2(z)
        w.add_(z)
        torch.sigmoid_(w)
        w += x
        return F.hardtanh_(w)


@torch.no_grad()
def test_in_place_operations_keep_their_meaning_and_leave_the_units_input_alone():
    torch.manual_seed(0)
    model, x = InPlace().eval(), torch.randn(2, 3, 5, 5)
    expected = model(x.clone())
    pair = build_chain(model, QuantConfig(), "layer")
    assert model.relu.inplace
    for chain in (pair.teacher, pair.student):
        value = x
        for unit in chain.units:
            before = value.clone()
            result = unit(value)
            assert torch.equal(value, before)
            value = result
        torch.testing.assert_close(value, expected)


def test_an_in_place_operation_without_a_twin_is_refused():
    with pytest.raises(PTQError, match=r"zero_\(\)"):
        build(Returns(lambda y: y.zero_()).eval())


def test_dropout_and_identity_leave_the_graph():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout2d(), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 4, 1)
    )
    pair = build(model.eval())
    kinds = {type(m) for m in pair.student.modules()} | {type(m) for m in pair.teacher.modules()}
    assert not kinds & {nn.Identity, nn.Dropout, nn.Dropout2d}


def test_the_model_is_not_modified():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    build(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model[2].inplace
    assert model[0].bias is None


def test_nodes_know_their_modules():
    gm = trace(nn.Sequential(nn.Sequential(nn.Linear(2, 2))).eval())
    (node,) = [node for node in gm.graph.nodes if node.op == "call_module"]
    assert [name for name, _ in node.meta["nn_module_stack"].values()] == ["0", "0.0"]
