"""The plan says what a calibration does, from shapes alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQError, QuantConfig
from lightning_ptq.cache import UnitCache
from lightning_ptq.graph import build_chain
from lightning_ptq.memory import unit_shapes
from lightning_ptq.models import digits_net
from lightning_ptq.network import NetworkCache
from lightning_ptq.plan import plan_text
from lightning_ptq.store import Store
from tests.helpers import tiny_images, tiny_net

SHAPE = (3, 8, 8)


def plan(net: nn.Module, quant: QuantConfig = QuantConfig(), samples: int = 40, **how: Any) -> str:  # noqa: B008
    return plan_text(build_chain(net, quant, "block", **how), quant, SHAPE, samples)


def units_of(text: str) -> dict[str, tuple[str, int, float]]:
    """Unit -> (shape, parameters, MiB)."""
    found = re.findall(r"^ +\d+  (\S+) +(\S+) +([\d,]+) +([\d.]+)$", text, re.MULTILINE)
    return {name: (shape, int(count.replace(",", "")), float(mib)) for name, shape, count, mib in found}


def layers_of(text: str) -> dict[str, tuple[str, str, int]]:
    """Layer -> (type, bits, parameters)."""
    found = re.findall(r"^ +(\S+) +(\w+) +(W\d+ A\d+) +([\d,]+)$", text, re.MULTILINE)
    return {name: (kind, bits, int(count.replace(",", ""))) for name, kind, bits, count in found}


def test_bits_that_are_yet_to_be_chosen_are_not_stated() -> None:
    given = {"blocks.0.conv1": {"weight_bits": 5}, "blocks.1.conv1": {"act_bits": 6}}
    text = plan(tiny_net(), QuantConfig(average_bits=3.0, overrides=given))
    found = dict(re.findall(r"^ +(\S+) +\w+ +(W\S+ A\S+) +[\d,]+$", text, re.MULTILINE))
    assert found == {
        "stem": "W8 A8",
        "blocks.0.conv1": "W5 A?",
        "blocks.0.conv2": "W? A?",
        "blocks.1.conv1": "W? A6",
        "blocks.1.conv2": "W? A?",
        "fc": "W8 A8",
    }
    assert "bits that are '?' are chosen when a fit starts, 3 on average" in text


class Attention(nn.Module):
    """A layer norm, which stays in float, and a product of activations, which does not, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.LayerNorm(36), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).flatten(2))  # (N, 8, 36)
        return self.fc((x @ x.transpose(1, 2)).mean(1))


@pytest.mark.parametrize("granularity", ["layer", "block", "stage", "net"])
@pytest.mark.parametrize(("net", "shape"), [(tiny_net, SHAPE), (digits_net, (1, 8, 8)), (Attention, SHAPE)])
def test_shapes_are_those_of_a_real_forward_pass(net: Any, shape: tuple[int, ...], granularity: Any) -> None:
    teacher = build_chain(net().eval(), QuantConfig(), granularity).teacher
    x, real = torch.randn(2, *shape), [shape]
    with torch.no_grad():
        for unit in teacher.units:
            x = unit(x)
            real.append(tuple(x.shape[1:]))
    assert unit_shapes(teacher, shape) == real


def test_every_unit_is_listed_with_shape_parameters_and_cache_size() -> None:
    samples = 2**18  # 2**18 numbers of 4 bytes are one MiB
    assert units_of(plan(tiny_net(), samples=samples)) == {
        # Batch norms are folded, so every convolution has a bias. Caches: the unit's inputs, its output, 5 logits.
        "stem": ("8x8x8", 3 * 8 * 9 + 8, 192 + 512 + 5),
        "blocks.0": ("8x8x8", 2 * (8 * 8 * 9 + 8), 2 * 512 + 512 + 5),
        "blocks.1": ("8x8x8", 2 * (8 * 8 * 9 + 8), 2 * 512 + 512 + 5),
        "fc": ("5", 8 * 5 + 5, 2 * 512 + 5 + 5),
    }


def test_the_cache_size_is_what_the_caches_take() -> None:
    chains = build_chain(tiny_net(), QuantConfig(), "block")
    images = tiny_images(32)
    planned = units_of(plan_text(chains, QuantConfig(), SHAPE, len(images) * 2**10))  # for two decimal places more
    cache = UnitCache(chains.teacher, chains.student, images, Store(torch.device("cpu")))
    for k, name in enumerate(chains.student.names):
        if k > 0:
            cache.advance(cache.student_out())
        held = {t.data_ptr(): t.nbytes for t in vars(cache).values() if isinstance(t, Tensor)}
        assert sum(held.values()) / 2**10 == pytest.approx(planned[name][2], abs=0.06)


def test_the_whole_network_is_listed_if_it_is_calibrated() -> None:
    chains, images = build_chain(tiny_net(), QuantConfig(), "block"), tiny_images(32)
    text = plan_text(chains, QuantConfig(), SHAPE, len(images) * 2**10, network=True)
    assert list(units_of(text))[-1] == "whole-network"
    with torch.no_grad():
        head_in = chains.teacher(images, stop=len(chains.teacher) - 1)
        cache = NetworkCache(chains.student, images, head_in, chains.teacher(images), Store(torch.device("cpu")), 32)
    held = sum(t.nbytes for t in vars(cache).values() if isinstance(t, Tensor))
    assert units_of(text)["whole-network"] == ("5", 0, pytest.approx(held / 2**10, abs=0.06))
    assert "whole-network" not in plan(tiny_net())


def test_every_layer_is_listed_with_its_bits_following_edges_and_overrides() -> None:
    quant = QuantConfig(2, 3, overrides={"blocks.0.*": {"weight_bits": 5}, "*.conv2": {"act_bits": 6}})
    assert layers_of(plan(tiny_net(), quant)) == {
        "stem": ("Conv2d", "W8 A8", 224),
        "blocks.0.conv1": ("Conv2d", "W5 A3", 584),
        "blocks.0.conv2": ("Conv2d", "W5 A6", 584),
        "blocks.1.conv1": ("Conv2d", "W2 A3", 584),
        "blocks.1.conv2": ("Conv2d", "W2 A6", 584),
        "fc": ("Linear", "W8 A8", 45),
    }
    same = layers_of(plan(tiny_net(), QuantConfig(2, 3, edges="same")))
    assert {bits for _, bits, _ in same.values()} == {"W2 A3"}


def test_the_head_line_sums_up_the_settings() -> None:
    first = plan(tiny_net(), QuantConfig(2, 16)).splitlines()[0]
    assert first == "4 units for 40 calibration images of shape 3x8x8, W2A16, edges 8bit, placement paper"


def test_what_stays_in_float_is_listed_with_its_reason() -> None:
    _, floats = plan(Attention().eval()).split("stays in floating point:\n")
    assert floats == "  norm: LayerNorm is kept in float"
    _, floats = plan(tiny_net(), leaf_modules=["blocks.0"]).split("stays in floating point:\n")
    assert floats == "  blocks.0: Block is kept whole by leaf_modules"


def test_products_and_the_quantized_share_are_listed() -> None:
    text = plan(Attention().eval())
    # By hand: 8 * 3 * 9 * 36 in the convolution, 8 * 8 * 36 in the product, 8 * 5 in the linear layer.
    assert "100.00 % of 10,120 multiply-adds for one image are quantized" in text
    assert "products of activations, A4 unless overridden:\n  matmul\n" in text
    share = 100 * (1 - 2 * 8 * 8 * 9 * 64 / (3 * 8 * 9 * 64 + 4 * 8 * 8 * 9 * 64 + 40))
    assert f"{share:.2f} % of" in plan(tiny_net(), leaf_modules=["blocks.0"])


def test_a_network_that_is_quantized_throughout_says_so() -> None:
    assert plan(tiny_net()).endswith("stays in floating point:\n  nothing with parameters")


@pytest.mark.parametrize(
    ("net", "shape", "unit"),
    [(tiny_net, (1, 8, 8), "stem"), (tiny_net, (3, 8), "stem"), (Attention, (3, 10, 10), "fc")],
)
def test_images_that_do_not_fit_name_the_unit_and_the_shape(net: Any, shape: tuple[int, ...], unit: str) -> None:
    teacher = build_chain(net().eval(), QuantConfig(), "block").teacher
    message = rf"images of shape {re.escape(str(shape))} do not fit the model: unit '{unit}' .*data\.resize"
    with pytest.raises(PTQError, match=re.compile(message, re.DOTALL)):
        unit_shapes(teacher, shape)


def test_a_plan_computes_nothing_and_changes_nothing() -> None:
    chains = build_chain(tiny_net(), QuantConfig(), "block")
    before = {key: value.clone() for key, value in chains.student.state_dict().items()}
    unit_shapes(chains.teacher, (3, 8192, 8192))  # 34 GB of activations, if they were real
    assert all(torch.equal(value, before[key]) for key, value in chains.student.state_dict().items())
