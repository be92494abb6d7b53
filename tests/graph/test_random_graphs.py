"""Networks drawn at random: whatever is rewritten, folded and cut, the chain is the network, in double precision."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from lightning_ptq.config import Granularity, QuantConfig
from lightning_ptq.graph import build_chain
from lightning_ptq.layers import quantized_layers
from lightning_ptq.quantizers import act_quantizers

NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
ACTIVATIONS: tuple[Any, ...] = (
    torch.relu,
    F.relu6,
    F.silu,
    F.hardswish,
    F.gelu,
    torch.sigmoid,
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.1),
    lambda x: x.clamp(-1, 1),
    lambda x: F.leaky_relu(x, 0.2, inplace=True),
)
# Each keeps the size of images and the number of channels.
KEEPERS: dict[str, Any] = {
    "maxpool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avgpool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "scale": lambda x: x * 0.5 - 1.25,
    "flipped": lambda x: 1.0 - x / 3,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "square": lambda x: x * x,
    "chunks": lambda x: torch.cat(list(x.chunk(2, 1))[::-1], 1),
    "pixels": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).view(x.shape),
    "shuffle": lambda x: x.view(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
    "mean": lambda x: x - x.mean((2, 3), keepdim=True),
}


class Step(nn.Module):
    """One random operation; `plan` is what was drawn."""

    def __init__(self, plan: tuple[Any, ...], channels: int, level: int) -> None:
        super().__init__()
        self.plan, kind = plan, plan[0]
        if kind == "conv":
            _, groups, bias, norm, padding_mode, kernel = plan
            groups = {"dense": 1, "pairs": channels // 2, "depthwise": channels}[groups]
            self.conv = nn.Conv2d(
                channels, channels, kernel, padding=kernel // 2, groups=groups, bias=bias, padding_mode=padding_mode
            )
            self.norm = nn.BatchNorm2d(channels, affine=norm == "affine") if norm else nn.Identity()
        elif kind == "transposed":
            _, groups, bias, norm = plan
            self.conv = nn.ConvTranspose2d(channels, channels, 3, 1, 1, groups=2 if groups else 1, bias=bias)
            self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        elif kind == "functional":
            self.weight = nn.Parameter(torch.randn(channels, channels, 1, 1) / channels**0.5)
        elif kind == "gate":
            self.squeeze, self.expand = nn.Linear(channels, 2), nn.Linear(2, channels)
        elif kind == "tokens":
            self.norm, self.fc = nn.LayerNorm(channels), nn.Linear(channels, channels)
        elif kind == "activation":
            module = ACTIVATIONS[plan[1]]
            self.module = module if isinstance(module, nn.Module) else nn.Identity()
        elif kind in ("residual", "concat"):
            self.body = Steps(plan[1], channels, level + 1)
            self.join = nn.Conv2d(2 * channels, channels, 1) if kind == "concat" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        kind = self.plan[0]
        if kind in ("conv", "transposed"):
            return self.norm(self.conv(x))
        if kind == "functional":
            return F.conv2d(x, self.weight)
        if kind == "gate":
            return x * torch.sigmoid(self.expand(self.squeeze(x.mean((2, 3))).relu()))[:, :, None, None]
        if kind == "tokens":
            tokens = x.flatten(2).transpose(1, 2)
            return (tokens + self.fc(self.norm(tokens))).transpose(1, 2).reshape(x.shape)
        if kind == "activation":
            function = ACTIVATIONS[self.plan[1]]
            return self.module(x) if isinstance(function, nn.Module) else function(x)
        if kind == "keep":
            return KEEPERS[self.plan[1]](x)
        if kind == "concat":
            return self.join(torch.cat([x, self.body(x)], 1))
        return x + self.body(x) if self.plan[2] else self.body(x) + x * 0.5


class Steps(nn.Module):
    def __init__(self, plans: list[tuple[Any, ...]], channels: int, level: int = 0) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Step(plan, channels, level) for plan in plans)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Net(nn.Module):
    """A stem, random steps, perhaps a strided convolution and a shared layer, and a head."""

    def __init__(self, plans: list[tuple[Any, ...]], head: str, twice: bool) -> None:
        super().__init__()
        self.stem, self.body, self.head, self.twice = nn.Conv2d(3, 4, 3, padding=1), Steps(plans, 4), head, twice
        if head != "dense":
            self.down = nn.Conv2d(4, 6, 3, 2, 1)
            self.fc = nn.Linear(6 if head == "mean" else 54, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem((x - 0.2) / 0.7))
        x = self.body(x) if self.twice else x
        if self.head == "dense":
            return x
        x = F.relu(self.down(x))
        return self.fc(x.mean((2, 3)) if self.head == "mean" else x.view(x.size(0), -1))


LEAVES = st.one_of(
    st.tuples(
        st.just("conv"),
        st.sampled_from(["dense", "pairs", "depthwise"]),
        st.booleans(),
        st.sampled_from(["", "affine", "plain"]),
        st.sampled_from(["zeros", "reflect"]),
        st.sampled_from([1, 3]),
    ),
    st.tuples(st.just("transposed"), st.booleans(), st.booleans(), st.booleans()),
    st.tuples(st.sampled_from(["functional", "gate", "tokens"])),
    st.tuples(st.just("activation"), st.integers(0, len(ACTIVATIONS) - 1)),
    st.tuples(st.just("keep"), st.sampled_from(sorted(KEEPERS))),
)
PLANS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.just("residual"), st.lists(inner, min_size=1, max_size=3), st.booleans()),
        st.tuples(st.just("concat"), st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)
NETS = st.tuples(
    st.lists(PLANS, min_size=1, max_size=5),
    st.sampled_from(["dense", "mean", "flat"]),
    st.booleans(),
    st.integers(0, 99),
)


def network(plans: list[tuple[Any, ...]], head: str, twice: bool, seed: int) -> nn.Module:
    """In double precision and eval mode, with random norms."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(plans, head, twice).double().eval()
        for module in net.modules():
            if isinstance(module, (*NORMS, nn.LayerNorm)):
                for name in ("weight", "running_var"):
                    if getattr(module, name, None) is not None:
                        nn.init.uniform_(getattr(module, name), 0.3, 2.0)
                for name in ("bias", "running_mean"):
                    if getattr(module, name, None) is not None:
                        nn.init.normal_(getattr(module, name), 0, 0.3)
        return net


def close(found: Tensor, truth: Tensor) -> bool:
    return found.shape == truth.shape and bool((found - truth).abs().max() <= 1e-9 * (1 + truth.abs().max()))


@given(NETS, st.sampled_from(get_args(Granularity)), st.sampled_from(["paper", "hardware"]), st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
@torch.no_grad()
def test_the_chain_is_the_network(net: Any, granularity: Any, placement: Any, pairs: bool) -> None:
    model = network(*net)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept, truth = x.clone(), model(x)
    config = QuantConfig(
        placement=placement, weight_symmetric=placement == "hardware", pairs="smooth" if pairs else "none"
    )
    chains = build_chain(model, config, granularity, image_shape=(3, 6, 6))
    # The model is left as it was, and so is the image, whatever works in place.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for chain in (chains.teacher, chains.student):
        assert close(chain(x), truth)
        # Units hand on one tensor each, and any number of them can be run by itself.
        values = [x]
        for unit in chain.units:
            values.append(unit(values[-1]))
            assert isinstance(values[-1], Tensor)
        assert close(values[-1], truth)
        middle = len(chain) // 2
        assert close(chain(chain(x, 0, middle), middle), truth)
        assert close(chain(x[:1]), truth[:1]), "any number of images"
    assert torch.equal(x, kept)
    assert len(chains.teacher) == len(chains.student) == len(set(chains.student.names))
    # Every layer once, in the unit that the plan says, with the very weight of the teacher's.
    found = [name for unit in chains.student.units for name, _ in quantized_layers(unit)]
    assert sorted(found) == sorted(layer.name for layer in chains.layers)
    for layer in chains.layers:
        student = chains.student.units[layer.unit].get_submodule(layer.name)
        assert student.weight is chains.teacher.units[layer.unit].get_submodule(layer.name).weight
    assert not act_quantizers(chains.teacher)
    assert act_quantizers(chains.student)
    assert all(isinstance(unit, fx.GraphModule) for unit in chains.student.units)
