"""Bringing channels together changes no number and makes ranges equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQError, QuantConfig
from lightning_ptq.equalize import equalize, factors, largest_by_input
from lightning_ptq.graph import build_chain
from tests.helpers import tiny_module

CPU = torch.device("cpu")


class Net(nn.Module):
    """Norms that linear layers alone read, one behind a transpose, one without biases; and two that others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.norm1, self.q, self.k = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.norm2, self.fc = nn.LayerNorm(6, bias=False), nn.Linear(6, 6, bias=False)
        self.norm3, self.fc3 = nn.LayerNorm(6), nn.Linear(6, 6)
        self.plain, self.head = nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).permute(0, 2, 1)  # (N, 16, 6)
        y = self.norm1(x).transpose(0, 1)
        x = x + (self.q(y) * self.k(y)).transpose(0, 1)
        x = x + self.fc(self.norm2(x).reshape(-1, 6)).view(-1, 16, 6)
        y = self.norm3(x)
        return self.head(self.plain(self.fc3(y) + y).mean(1))


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval().double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(-2, 2)
    return model


def images() -> Tensor:
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def alone(x: Tensor) -> Tensor:
    return x[None]


def test_only_norms_that_linear_layers_alone_read_are_found() -> None:
    norms = build_chain(net(), QuantConfig(), "block").student.norms
    assert [(group.source, group.layers) for group in norms] == [("norm1", ("q", "k")), ("norm2", ("fc",))]


@pytest.mark.parametrize("how", ["ranges", "smooth"])
def test_the_function_stays_and_both_networks_change_alike(how: Any) -> None:
    pair, x = build_chain(net(), QuantConfig(), "block"), images()
    before = {name: value.clone() for name, value in pair.student.state_dict().items()}
    equalize(pair.student, x, QuantConfig(norms=how), CPU, alone)
    with torch.no_grad():
        for chain in (pair.teacher, pair.student):
            torch.testing.assert_close(chain(x), net()(x), rtol=1e-9, atol=1e-9)
    changed = {n.split(".", 2)[2] for n, v in pair.student.state_dict().items() if not torch.equal(v, before[n])}
    shifted = {"norm1.bias", "norm2.bias", "q.bias", "k.bias", "fc.bias"}
    scaled = {"norm1.weight", "norm2.weight", "q.weight", "k.weight", "fc.weight"}
    assert changed == (scaled | shifted if how == "ranges" else scaled | {"norm1.bias"})


def test_ranges_become_equal() -> None:
    pair, x = build_chain(net(), QuantConfig(), "block"), images()
    equalize(pair.student, x, QuantConfig(), CPU, alone)
    seen: list[Tensor] = []
    pair.student.find(pair.student.norms[0].quantizer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        pair.student(x)
    rows = seen[0].flatten(0, -2)
    width, middle = rows.amax(0) - rows.amin(0), (rows.amax(0) + rows.amin(0)) / 2
    torch.testing.assert_close(width, width.mean().expand(6), rtol=1e-6, atol=0)
    assert float(middle.abs().max()) < 1e-6 * float(width.mean())


def test_a_last_batch_of_one_image_hardly_moves_a_range() -> None:
    x = torch.randn(65, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[64] = 0.0
    weights = []
    for some in (x, x[:64]):
        pair = build_chain(net(), QuantConfig(), "block")
        equalize(pair.student, some, QuantConfig(norms="smooth"), CPU, alone)
        weights.append(pair.student.find("norm1").state_dict()["weight"])
    torch.testing.assert_close(*weights, rtol=0.01, atol=0)


def test_none_leaves_everything_as_it_is() -> None:
    pair = build_chain(net(), QuantConfig(), "block")
    before = {name: value.clone() for name, value in pair.student.state_dict().items()}
    equalize(pair.student, images(), QuantConfig(norms="none"), CPU, alone)
    assert all(torch.equal(value, before[name]) for name, value in pair.student.state_dict().items())
    with pytest.raises(PTQError, match="norms='some' is unknown"):
        QuantConfig(norms="some")  # type: ignore[arg-type]


def test_smooth_factors_are_those_of_the_paper() -> None:
    low, high, weights = torch.tensor([-4.0, -1.0]), torch.tensor([2.0, 9.0]), torch.tensor([1.0, 4.0])
    factor, shift = factors(low, high, weights, "smooth")
    expected = torch.tensor([4.0 / 1.0, 9.0 / 4.0], dtype=torch.float64).sqrt()
    torch.testing.assert_close(factor, expected / expected.mean())
    assert not shift.any()


def test_channels_that_do_not_move_are_not_blown_up() -> None:
    factor, _ = factors(torch.tensor([-1.0, 3.0]), torch.tensor([1.0, 3.0]), torch.ones(2), "ranges")
    assert factor.tolist() == [2.0, 0.01]
    factor, shift = factors(torch.zeros(2), torch.zeros(2), torch.ones(2), "ranges")
    assert factor.tolist() == [1.0, 1.0]
    assert shift.tolist() == [0.0, 0.0]


def test_a_weight_that_is_used_twice_is_folded_for_one_use_only() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.fc = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return nn.functional.linear(y, self.fc.weight) + self.fc(self.norm(y))

    torch.manual_seed(0)
    model, x = Tied().eval().double(), torch.randn(40, 6, dtype=torch.float64)
    nn.init.uniform_(model.norm.weight, 0.5, 4)
    pair = build_chain(model, QuantConfig(), "block")
    assert len(pair.student.norms) == 1
    equalize(pair.student, x, QuantConfig(), CPU, alone)
    with torch.no_grad():
        for chain in (pair.teacher, pair.student):
            torch.testing.assert_close(chain(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("move", "found"),
    [
        (lambda y: y.permute(1, 0, 2), 1),
        (lambda y: torch.permute(y, dims=(1, 0, 2)), 1),
        (lambda y: y[:, 1:], 1),
        (lambda y: y.reshape(-1, 6), 1),
        (lambda y: y[..., [2, 0, 1, 3, 4, 5]], 0),
        (lambda y: y.roll(1, -1), 0),
        (lambda y: torch.nn.functional.pad(y, (0, 0, 1, 0)), 0),
    ],
)
def test_only_moves_of_whole_channel_vectors_may_lie_between(move: Any, found: int) -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.fc = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(move(self.norm(self.stem(x))))

    assert len(build_chain(Moved().eval(), QuantConfig(), "net").student.norms) == found
    assert build_chain(Moved().eval(), QuantConfig(norms="none"), "net").student.norms == ()


def test_images_that_do_not_fit_are_refused_by_the_units_name() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.fc = nn.Conv2d(3, 6, 1), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(self.stem(x).mean(2)))

    student = build_chain(Flat().eval(), QuantConfig(), "block").student
    with pytest.raises(PTQError, match="unit 'fc' can't take an input of shape"):
        equalize(student, torch.randn(8, 3, 5, 5), QuantConfig(), CPU, alone)


# ---- pairs of layers ----

SMOOTH = QuantConfig(pairs="smooth")


class Pairs(nn.Module):
    """Layers behind layers: with and without a ReLU, depthwise, grouped, pooled; and three that are no pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.grouped, self.prelu = nn.Conv2d(8, 6, 3, groups=2), nn.PReLU(6)
        self.b, self.c, self.d = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.fc1, self.fc2 = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dw(torch.relu(self.bn(self.a(x))))
        x = self.prelu(self.grouped(nn.functional.max_pool2d(x, 2)))
        x = self.b(x)
        x = nn.functional.relu6(self.c(x + self.d(x)))  # the sum, and behind b two readers of which one is no layer
        x = torch.sigmoid(x).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


def pairs() -> Pairs:
    torch.manual_seed(0)
    model = Pairs().eval().double()
    model.bn.running_var.uniform_(0.1, 5.0)
    for layer in (model.a, model.dw, model.grouped, model.fc1):
        layer.weight.data *= torch.rand(len(layer.weight), *[1] * (layer.weight.dim() - 1)) * 10
    return model


def test_pairs_are_layers_that_layers_alone_read_behind_homogeneous_operations() -> None:
    student = build_chain(pairs(), SMOOTH, "net").student
    assert [(g.source, g.layers) for g in student.pairs] == [
        ("a", ("dw",)),
        ("dw", ("grouped",)),
        ("grouped", ("b",)),
        ("fc1", ("fc2",)),
    ]
    assert build_chain(pairs(), QuantConfig(), "net").student.pairs == ()


@pytest.mark.parametrize("granularity", ["net", "layer"])
@torch.no_grad()
def test_scaling_pairs_keeps_the_function_and_brings_ranges_together(granularity: Any) -> None:
    pair, x = build_chain(pairs(), SMOOTH, granularity), images()

    equalize(pair.student, x, SMOOTH, CPU, alone)
    for chain in (pair.teacher, pair.student):
        torch.testing.assert_close(chain(x), pairs()(x), rtol=1e-9, atol=1e-9)
    for group in pair.student.pairs:
        seen: list[Tensor] = []
        pair.student.find(group.quantizer).register_forward_pre_hook(lambda _, args, s=seen: s.append(args[0]))
        pair.student(x)
        largest = seen[0].abs().transpose(0, 1).flatten(1).amax(1)
        if group.layers == ("dw",):  # depthwise: one range for all
            torch.testing.assert_close(largest, largest.mean().expand(8), rtol=1e-6, atol=0)
        elif group.layers != ("grouped",):  # halfway: as much of the difference in the activation as in the weight
            ratio = (largest / largest_by_input(pair.student.find(group.layers[0])))[largest > 0]  # dead ReLUs are held
            torch.testing.assert_close(ratio, ratio.mean().expand(len(ratio)), rtol=1e-6, atol=0)


class NoPairs(nn.Module):
    """Pooling behind a linear layer pools channels; and readers of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool, self.b = nn.Linear(8, 6), nn.MaxPool1d(3, 1, 1), nn.Linear(6, 6)
        self.conv, self.fc = nn.Conv1d(6, 6, 1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.pool(self.a(x.mean(1))))  # (N, 6, 6)
        return self.conv(x) + self.fc(x)


def test_pools_behind_linear_layers_and_readers_of_two_kinds_make_no_pair() -> None:
    assert build_chain(NoPairs().eval(), SMOOTH, "net").student.pairs == ()


def test_pairs_and_the_correction_towards_statistics_exclude_each_other() -> None:
    with pytest.raises(PTQError, match="distribution_steps compares with statistics that pairs='smooth' rescales"):
        tiny_module(SMOOTH, method="pdquant", distribution_steps=2)


def test_largest_weights_are_found_for_each_input_channel() -> None:
    conv = nn.Conv2d(6, 4, 3, groups=2)
    expected = []
    for channel in range(6):
        rows = slice(0, 2) if channel < 3 else slice(2, 4)
        expected.append(conv.weight[rows, channel % 3].abs().max())
    assert torch.equal(largest_by_input(conv), torch.stack(expected))
    linear = nn.Linear(3, 5)
    assert torch.equal(largest_by_input(linear), linear.weight.abs().amax(0))
