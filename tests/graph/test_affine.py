"""Fixed numbers of channels behind a layer are folded into it, against the unfolded model in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from lightning_ptq import QuantConfig
from lightning_ptq.graph import ChainPair, build_chain
from lightning_ptq.graph.fold import statistics_of


class Behind(nn.Module):
    """A layer, and what comes behind it."""

    def __init__(self, layer: nn.Module, behind: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.behind = layer, behind
        self.gain, self.shift = (nn.Parameter(torch.randn(shape)) for _ in range(2))
        self.pixels = nn.Parameter(torch.randn(5, 5))
        self.frozen, self.norm = FrozenBatchNorm2d(6), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.behind(self, self.layer(x))
        return y


def net_and_chain(layer: nn.Module, behind: Any, shape: tuple[int, ...]) -> tuple[Behind, ChainPair]:
    torch.manual_seed(0)
    net = Behind(layer, behind, shape).eval().double()
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(net.frozen, name).uniform_(0.3, 2.0)
    return net, build_chain(net, QuantConfig(), "block")


@pytest.mark.parametrize(
    ("layer", "behind", "shape", "x"),
    [
        (lambda: nn.Conv2d(3, 6, 3, bias=False), lambda s, y: y * s.gain + s.shift, (6, 1, 1), (2, 3, 7, 7)),
        (lambda: nn.Conv2d(3, 6, 3), lambda s, y: s.shift + s.gain * y, (1, 6, 1, 1), (2, 3, 7, 7)),
        (lambda: nn.Conv2d(3, 6, 3), lambda s, y: torch.add(torch.mul(y, 0.5), 2), (1,), (2, 3, 7, 7)),
        (lambda: nn.Conv2d(3, 6, 3), lambda s, y: s.frozen(y), (1,), (2, 3, 7, 7)),
        (lambda: nn.Conv2d(3, 6, 3), lambda s, y: y * s.gain, (1, 1, 1, 1), (2, 3, 7, 7)),
        (lambda: nn.Linear(3, 6, bias=False), lambda s, y: y * s.gain + s.shift, (6,), (2, 7, 3)),
    ],
    ids=["channels", "reversed", "scalars", "frozen", "one", "linear"],
)
@torch.no_grad()
def test_what_is_fixed_for_each_channel_is_folded(
    layer: Any, behind: Any, shape: tuple[int, ...], x: tuple[int, ...]
) -> None:
    net, pair = net_and_chain(layer(), behind, shape)
    images = torch.randn(x, dtype=torch.float64)
    torch.testing.assert_close(pair.teacher(images), net(images), rtol=1e-12, atol=1e-12)
    (unit,) = pair.teacher.units
    assert [node.op for node in unit.graph.nodes if node.op != "call_module"] == ["placeholder", "output"]
    assert not pair.floats


@pytest.mark.parametrize(
    ("behind", "shape"),
    [
        (lambda s, y: y * s.pixels, (1,)),  # positions, not channels
        (lambda s, y: y * s.gain, (6, 5, 5)),
        (lambda s, y: y * s.gain + y, (6, 1, 1)),  # read twice
        (lambda s, y: torch.relu(y) * s.gain, (6, 1, 1)),
        (lambda s, y: torch.add(y, s.gain, alpha=2), (6, 1, 1)),
        (lambda s, y: s.layer.weight.mean() * s.layer(y[:, :3]) + s.layer(y[:, 3:]), (1,)),  # called again
        (lambda s, y: y * y, (1,)),
    ],
)
@torch.no_grad()
def test_what_is_not_stays_right(behind: Any, shape: tuple[int, ...]) -> None:
    net, pair = net_and_chain(nn.Conv2d(3, 6, 3), behind, shape)
    images = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(pair.teacher(images), net(images), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_what_lies_between_a_layer_and_its_batch_norm_keeps_neither_from_folding() -> None:
    net, _ = net_and_chain(nn.Conv2d(3, 6, 3), lambda s, y: s.norm(y * 0.5), (1,))
    net.norm = nn.BatchNorm2d(6).double().eval()
    net.norm.running_var.uniform_(0.5, 2)
    pair = build_chain(net, QuantConfig(), "block")
    images = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(pair.teacher(images), net(images), rtol=1e-12, atol=1e-12)
    assert not pair.floats


@torch.no_grad()
def test_statistics_of_a_folded_batch_norm_follow() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
    norm.weight.uniform_(-2, 2)
    norm.bias.normal_()
    net = Behind(nn.Sequential(conv, norm), lambda s, y: y * s.gain + s.shift, (6, 1, 1))
    x = torch.randn(64, 3, 9, 9)
    for _ in range(200):
        net.train()(x)
    (known,) = (s for m in build_chain(net.eval(), QuantConfig(), "block").teacher.modules() if (s := statistics_of(m)))
    y = net(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(known[0], y.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(known[1], y.std(1), rtol=1e-3, atol=1e-3)
