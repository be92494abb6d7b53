"""The chain computes what the model does: where tensors are overwritten under another name, where rows are no images,
where parameters are read twice, and where no graph can show what Python does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ptq import CalibrationDataModule, PTQError, PTQModule, QuantConfig
from lightning_ptq.equalize import equalize
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.aliases import overwritten_alias
from lightning_ptq.graph.trace import op_name, trace
from tests.helpers import tiny_images, trainer


@torch.fx.wrap
def wrapped(x: Tensor) -> int:
    return x.shape[1]


class Net(nn.Module):
    """Two convolutions and a head; `between` is what a user does to the first one's output in between."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.relu, self.drop, self.between = nn.ReLU(inplace=True), nn.Dropout(0.5), between
        self.idle, self.flat = nn.Dropout(0.5, inplace=True), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.between(self, self.a(x))).mean((2, 3)))


def part(net: Net, x: Tensor) -> Tensor:
    x.narrow(1, 0, 4).relu_()
    return x


def half(net: Net, x: Tensor) -> Tensor:
    first, _ = x.chunk(2, 1)
    first.mul_(2.0)
    return x


def first_of_two(net: Net, x: Tensor) -> Tensor:
    """As attention scales its queries: parts of a split are no names of one another."""
    first, second = x.chunk(2, 1)
    first *= 2.0
    return torch.cat([first, second.relu_()], 1)


def indexed(net: Net, x: Tensor) -> Tensor:
    net.relu(x[:, :4])
    return x


def before(net: Net, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    F.relu_(x)
    return x + flat.mean(2)[:, :, None, None]


def converted(net: Net, x: Tensor) -> Tensor:
    x.float().contiguous().detach().relu_()
    return x


def written_to(net: Net, x: Tensor) -> Tensor:
    torch.mul(x, 2.0, out=x)
    return x


def assigned(net: Net, x: Tensor) -> Tensor:
    x[:, :4] = x[:, :4] * 2
    return x


def added(net: Net, x: Tensor) -> Tensor:
    y = x
    y += 1.0
    y @= torch.eye(8)
    return x


def under_dropout(net: Net, x: Tensor) -> Tensor:
    y = net.drop(x)
    y.relu_()
    return x


def flattened(net: Net, x: Tensor) -> Tensor:
    net.flat(x).mul_(0.5)
    F.relu(x[:, 2:], inplace=True)
    return x


def by_operators(net: Net, x: Tensor) -> Tensor:
    y = x
    y -= 0.25
    y *= 3.0
    y /= 2.0
    y **= 2
    return x


def dropped(net: Net, x: Tensor) -> Tensor:
    """In eval mode it overwrites nothing."""
    y = x.permute(0, 1, 3, 2)
    return net.idle(x) + y


def numbered(net: Net, x: Tensor) -> Tensor:
    """What a wrapped function gives, a number here, may be a tensor: `torch.export` knows."""
    size = wrapped(x)
    more = size
    more += 1
    return x * size + more


def counted(net: Net, x: Tensor) -> Tensor:
    """Numbers are not overwritten."""
    size = x.size(2)
    more = size
    more += 1
    return x * size + more


def viewed_later(net: Net, x: Tensor) -> Tensor:
    """A view that is taken of the result: nothing to mind."""
    height = x.shape[2]
    y = net.relu(x)
    return y.view(-1, 8, height * 8).view_as(x)


@pytest.mark.parametrize("granularity", ["layer", "net"])
@pytest.mark.parametrize(
    ("between", "aliased"),
    [
        (part, True),
        (half, True),
        (first_of_two, False),
        (indexed, True),
        (before, True),
        (converted, True),
        (written_to, True),
        (flattened, True),
        (numbered, True),
        (by_operators, False),
        (dropped, False),
        (assigned, None),  # fx does not follow it
        (added, False),
        (under_dropout, False),
        (counted, False),
        (viewed_later, False),
    ],
)
@torch.no_grad()
def test_what_is_overwritten_is_overwritten_for_all_who_read_it(
    between: Any, aliased: bool | None, granularity: Any
) -> None:
    torch.manual_seed(0)
    model, x = Net(between).eval(), torch.randn(4, 3, 8, 8)
    if aliased is not None:
        assert (overwritten_alias(trace(model)) is not None) == aliased
    pair = build_chain(model, QuantConfig(), granularity, image_shape=(3, 8, 8))
    for chain in (pair.teacher, pair.student):
        given = x.clone()
        torch.testing.assert_close(chain(given), model(x.clone()))
        assert torch.equal(given, x)


def test_an_alias_that_export_can_t_follow_either_is_refused() -> None:
    def sized(net: Net, x: Tensor) -> Tensor:
        return part(net, x) + torch.ones(8, 8)  # images of 8 pixels, which nobody tells

    model = Net(sized).eval()
    with pytest.raises(PTQError, match=r"'relu_' overwrites a tensor that is read under another name later.*8"):
        build_chain(model, QuantConfig(), "block")
    build_chain(model, QuantConfig(), "block", image_shape=(3, 8, 8))


class Whole(nn.Module):
    """Kept whole, it overwrites what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5) if float(x.sum()) != 0.1 else x


def test_a_module_that_overwrites_a_kept_tensor_is_refused() -> None:
    model = nn.Sequential(Whole(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)).eval()
    with pytest.raises(PTQError, match=r"unit '1' overwrites what it reads.*Have it work on a copy"):
        build_chain(model, QuantConfig(), "layer", leaf_modules=["0"], image_shape=(3, 8, 8))


class Forks(nn.Module):
    """Takes another way for what fx traces with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head((x.relu() if torch.is_tensor(x) else x).mean((2, 3)))


def test_a_difference_of_a_hundredth_is_none_of_rounding() -> None:
    class Hardly(Forks):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).mean((2, 3)) * (1.0 if torch.is_tensor(x) else 1.01))

    with pytest.raises(PTQError, match="something else than it does: by 0"):
        build_chain(Hardly().eval(), QuantConfig(), "block")


def test_the_model_is_not_run_itself() -> None:
    class Counts(Forks):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head(self.conv(x).mean((2, 3)))

    model = Counts().eval()
    build_chain(model, QuantConfig(), "block")
    assert model.calls == 0


@pytest.mark.parametrize("shape", [None, (3, 8, 8)])
def test_a_chain_that_computes_something_else_is_refused(shape: Any) -> None:
    with pytest.raises(PTQError, match=r"units made of Forks give something else than it does: by \d+\.\d%"):
        build_chain(Forks().eval(), QuantConfig(), "block", image_shape=shape)


def test_what_gives_something_else_each_time_is_not_compared() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + torch.rand_like(x)).mean((2, 3)))

    assert len(build_chain(Random().eval(), QuantConfig(), "block").teacher) == 1


class Tokens(nn.Module):
    """Sequence first: behind the first layer rows are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.l1, self.l2, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2).permute(2, 0, 1)
        return self.head(self.l2(F.relu(self.l1(x))).mean(0))


class Encoder(Tokens):
    """The same that torch.export alone follows, with quantizers between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.a(x).flatten(2).permute(2, 0, 1)).mean(0))


@pytest.mark.parametrize("kind", [Tokens, Encoder])
def test_no_unit_ends_where_rows_are_no_images(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(5, 3, 8, 8)
    for granularity in ("layer", "block"):
        teacher = build_chain(model, QuantConfig(), granularity, image_shape=(3, 8, 8)).teacher  # type: ignore[arg-type]
        assert len(teacher) > 1
        with torch.no_grad():
            wanted, y = model(x), x
            for unit in teacher.units:
                y = torch.cat([unit(y[:2]), unit(y[2:])])
                assert len(y) == 5
        torch.testing.assert_close(y, wanted)


class ReadTwice(nn.Module):
    """Biases that two layers share, and parameters of folded layers that something else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.n2 = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.LayerNorm(8)
        self.l1, self.l2, self.l3, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.bn = nn.BatchNorm1d(8)
        self.l2.bias, self.n2.bias = self.l1.bias, self.norm.bias
        for name, p in self.named_parameters():
            p.data.uniform_(0.2, 2.0) if name in ("norm.weight", "n2.weight") else p.data.normal_()
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.2, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.l1(self.norm(self.a(x).flatten(2).transpose(1, 2)))
        x = self.l2(self.n2(F.gelu(x))) * self.norm.weight
        return self.head(self.bn(self.l3(x.mean(1))) + self.l3.bias)


def test_a_parameter_with_two_readers_is_changed_for_one_only() -> None:
    torch.manual_seed(0)
    model, x = ReadTwice().eval(), torch.randn(40, 3, 16, 16)
    pair = build_chain(model, QuantConfig(), "block")
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(pair.teacher(x), wanted, rtol=1e-4, atol=1e-4)
        equalize(pair.student, x, QuantConfig(), torch.device("cpu"), lambda y: [y])
        torch.testing.assert_close(pair.teacher(x), wanted, rtol=1e-4, atol=1e-4)


class NormOfRows(nn.Module):
    """As many tokens as features, and a batch norm of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.bn, self.head = (
            nn.Conv2d(3, 8, 4, 4),
            nn.Linear(8, 16),
            nn.BatchNorm1d(16),
            nn.Linear(16, 4),
        )
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.2, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.fc(self.a(x).flatten(2).transpose(1, 2)))).mean(1))


def test_a_batch_norm_of_rows_is_not_folded_into_features() -> None:
    torch.manual_seed(0)
    model, x = NormOfRows().eval(), torch.randn(4, 3, 16, 16)
    pair = build_chain(model, QuantConfig(), "block", image_shape=(3, 16, 16))
    with torch.no_grad():
        torch.testing.assert_close(pair.teacher(x), model(x))
    assert [f.name for f in pair.floats if f.name == "bn"] == ["bn"]


class Rolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.fc, self.head = (
            nn.Conv2d(3, 16, 4, 4),
            nn.LayerNorm(16),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )
        self.norm.weight.data.uniform_(0.1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x).flatten(2).transpose(1, 2))
        return self.head(self.fc(torch.roll(x, (1, 3), (1, 2))).mean(1))


def test_channels_that_are_rolled_are_not_brought_together() -> None:
    assert build_chain(Rolled().eval(), QuantConfig(), "block").student.norms == ()


def test_a_change_of_the_function_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Rolled().eval(), torch.randn(16, 3, 16, 16)
    monkeypatch.setattr("lightning_ptq.graph.norms.is_move", lambda node: op_name(node) == "roll")
    pair = build_chain(model, QuantConfig(), "block")
    assert pair.student.norms
    with pytest.raises(PTQError, match="bringing channels together has changed what the float network computes"):
        equalize(pair.student, x, QuantConfig(), torch.device("cpu"), lambda y: [y])


@pytest.mark.parametrize("pattern", ["a", "head"])
def test_a_layer_that_is_named_stays_in_float(pattern: str) -> None:
    pair = build_chain(Net(viewed_later).eval(), QuantConfig(), "block", leaf_modules=[pattern], image_shape=(3, 8, 8))
    assert pattern not in [layer.name for layer in pair.layers]
    (reason,) = [f.reason for f in pair.floats if f.name == pattern]
    assert reason.endswith("is named by leaf_modules")


class Keeps(nn.Module):
    """Keeps what it made for images of a size; wrapped or whole, it is not run on shapes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] not in self.made:
            self.made[x.shape[2:]] = torch.linspace(0, 1, x.shape[3]).expand(x.shape[2], -1)
        return x + self.made[x.shape[2:]]


def test_a_module_that_keeps_what_it_made_goes_in() -> None:
    model = nn.Sequential(Keeps(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    pair = build_chain(model, QuantConfig(), "layer", leaf_modules=["0"], image_shape=(3, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(pair.teacher(x), model(x))


def test_outputs_that_are_no_numbers_are_seen() -> None:
    class Roots(Forks):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).mean((2, 3))
            return self.head(x.abs() if torch.is_tensor(x) else x.sqrt())

    with pytest.raises(PTQError, match="give something else than it does"):
        build_chain(Roots().eval(), QuantConfig(), "block")


def test_a_network_that_gives_something_else_each_time_may_have_norms() -> None:
    class Noisy(Rolled):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.a(x).flatten(2).transpose(1, 2))
            return self.head(self.fc(x).mean(1)) + torch.rand(4)

    pair = build_chain(Noisy().eval(), QuantConfig(), "block", image_shape=(3, 16, 16))
    equalize(pair.student, torch.randn(16, 3, 16, 16), QuantConfig(), torch.device("cpu"), lambda y: [y])


def test_operators_in_place_are_called_like_those_that_are_not() -> None:
    names = [node.name for node in trace(Net(by_operators).eval()).graph.nodes]
    assert [name for name in names if name in ("sub", "mul", "truediv")] == ["sub", "mul", "truediv"]


def test_a_model_in_float64_is_refused_by_name(tmp_path: Any) -> None:
    module = PTQModule(Net(viewed_later).eval().double(), method="nearest")
    with pytest.raises(PTQError, match=r"the model is in float64, and unit 'a' fails on float32: .*Call model\.float"):
        trainer(tmp_path).fit(module, datamodule=CalibrationDataModule.from_loaders([tiny_images(40)]))
