"""Sensitivities against slow truths, allocation against brute force, and mixed precision through a fit and a resume."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQError, PTQModule, QuantConfig
from lightning_ptq.allocation import Allocation, allocate, apply, choices
from lightning_ptq.calibration import estimate_ranges
from lightning_ptq.divergence import LEARNED, Divergences, displaced, divergences
from lightning_ptq.front import Front, front_data, front_text, pareto_front, plot_front
from lightning_ptq.graph import ChainPair, LayerPlan, build_chain
from lightning_ptq.graph.arithmetic import Counts, counts_of
from lightning_ptq.layers import REGISTRY, QuantizedLayer
from lightning_ptq.quantizers import ActQuantizer, act_quantizers, float_mode
from lightning_ptq.ranges import weight_qparams
from lightning_ptq.sensitivity import BITS, Kind, Sensitivity, sensitivities
from lightning_ptq.store import chunks
from tests.helpers import TinyNet, assert_equal_states, quantization_state, tiny_data, tiny_images, tiny_net, trainer

CPU = torch.device("cpu")


def alone(x: Tensor) -> Tensor:
    return x[None]


def chains(quant: QuantConfig = QuantConfig()) -> ChainPair:  # noqa: B008 (frozen)
    return build_chain(tiny_net(), quant, "block")


def measured(pair: ChainPair, images: Tensor) -> list[Sensitivity]:
    return sensitivities(pair.teacher, pair.student, images, QuantConfig(), CPU)


def lost_by(pair: ChainPair, images: Tensor, learned: bool, **options: Any) -> Divergences:
    return divergences(pair.teacher, pair.student, images, QuantConfig(), CPU, alone, learned, **options)


def sure() -> TinyNet:
    """Its divergences are far above what float32 resolves."""
    net = tiny_net()
    net.fc.weight.data *= 30.0
    return net


@pytest.mark.parametrize("learned", [False, True])
def test_every_tensor_is_measured_at_every_number_of_bits_and_nothing_is_left_behind(learned: bool) -> None:
    pair = chains()
    before = {name: value.clone() for name, value in pair.student.state_dict().items()}
    found = measured(pair, tiny_images(32))
    lost = lost_by(pair, tiny_images(32), learned)
    acts = [f"act_{name}" for name in ("x", "relu", "relu_1", "relu_2", "relu_3", "mean")]
    tensors = [layer.name for layer in pair.layers] + acts
    assert sorted((s.name, s.bits) for s in found) == sorted(itertools.product(tensors, BITS))
    assert {(s.kind, s.name, s.bits) for s in found} == lost.keys()
    after = pair.student.state_dict()
    kept = [key for key in before if key.endswith(("ready", "weight", "bias"))]
    assert all(torch.equal(after[key], before[key]) for key in kept)
    assert {q.bits for q in act_quantizers(pair.student)} == {4, 8}
    images = tiny_images(4)
    torch.testing.assert_close(pair.student(images), pair.teacher(images))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_divergences_are_the_same_where_units_read_more_than_images_hold(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in most networks at 224 pixels: fewer rows pass through a later unit at once than through the first."""
    images = tiny_images(16)
    pair = build_chain(sure(), QuantConfig(), "block")
    expected = lost_by(pair, images, learned=True)
    numbers = rows * images[0].numel() * 3  # a block reads 2.7 times as many
    monkeypatch.setattr("lightning_ptq.divergence.chunks", partial(chunks, numbers=numbers))
    found = lost_by(pair, images, learned=True)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_displaced_weight_comes_back_from_an_error_and_is_the_layers_alone() -> None:
    pair = chains()
    layer = pair.student.find("blocks.0.conv1")
    assert isinstance(layer, QuantizedLayer)
    weight, value = layer.weight, layer.weight.clone()
    layer.weight_quantizer.set_range(weight, torch.full((8,), 0.1), torch.full((8,), 7.0))
    rounded = layer.weight_quantizer(value)

    def fail() -> None:
        with displaced(layer, 0.25):
            torch.testing.assert_close(layer.weight.data, (value + rounded) / 2)
            assert torch.equal(weight, value)
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail()
    assert layer.weight is weight


def test_what_takes_long_says_how_long() -> None:
    pair, said = chains(), list[str]()
    lost_by(pair, tiny_images(16), False, say=said.append)
    assert [line.split(", at most")[0] for line in said] == [
        f"mixed precision: {done} of 12 tensors are tried" for done in (3, 6, 9)
    ]


def test_only_what_can_be_chosen_is_tried() -> None:
    pair = chains(QuantConfig(overrides={"blocks.1.conv1": {"weight_bits": 8}}))
    among = choices(pair.layers, "bops")
    assert ("weight", "blocks.1.conv1") not in among  # what it reads is still to be chosen
    assert ("activation", "act_relu_2") in among
    edges = {("weight", "stem"), ("weight", "fc"), ("activation", "act_x"), ("activation", "act_mean")}
    assert not edges & among
    assert edges < choices(chains(QuantConfig(edges="same")).layers, "memory")
    assert lost_by(pair, tiny_images(16), True, among=among).keys() == {(*t, bits) for t in among for bits in BITS}
    assert {kind for kind, _ in choices(pair.layers, "size")} == {"weight"}


class Product(nn.Module):
    """What `b` reads is a factor of a product too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x.mean(1)))
        return self.d(torch.relu(self.c(torch.relu(self.b(y)))) + y @ y)


def test_what_a_product_reads_too_is_not_chosen_but_the_weight_is() -> None:
    layers = build_chain(Product().eval(), QuantConfig(), "layer").layers
    assert {layer.name: layer.fixed for layer in layers}["b"] == {"act_bits"}
    assert choices(layers, "bops") == {("weight", "b"), ("weight", "c"), ("activation", layers[2].reads)}


class Scale(nn.Conv2d):
    """A layer of one's own, of which torch's flop counter knows nothing."""


def test_a_layer_without_counted_arithmetic_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class QuantScale(QuantizedLayer, Scale):
        def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return x * weight.sum((1, 2, 3))[:, None, None]

    monkeypatch.setitem(REGISTRY, Scale, QuantScale)
    monkeypatch.setattr(Scale, "forward", lambda self, x: x * self.weight.sum((1, 2, 3))[:, None, None])
    first, scale, last = nn.Conv2d(3, 8, 3), Scale(8, 8, 1, bias=False), nn.Conv2d(8, 5, 3)
    net = nn.Sequential(first, nn.ReLU(), scale, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), last)
    pair = build_chain(net.eval(), QuantConfig(), "layer", leaf_modules=["2"])
    counts = counts_of(pair.student, (3, 8, 8))
    assert counts.multiply_adds["2"] == 0
    assert set(counts.elements) == {layer.reads for layer in pair.layers}
    assert (
        allocate(pair.layers, lost_by(pair, tiny_images(16), True), counts, 3.0, "bops").weights["2"] > 3
    )  # it pays nothing


def test_fewer_bits_cost_more_and_the_estimate_is_the_true_error_to_first_order() -> None:
    pair, images = chains(), tiny_images(256)
    found = {(s.name, s.bits): s for s in measured(pair, images)}
    for name in {s.name for s in found.values()}:
        errors = [found[name, bits].error for bits in BITS]
        assert errors == sorted(errors, reverse=True), name
    for learned in (False, True):
        lost = lost_by(build_chain(sure(), QuantConfig(), "block"), images, learned)
        for kind, name in {key[:2] for key in lost}:
            # Measured, not a bound: neighbours may cost alike.
            assert lost[kind, name, 2] > 4 * lost[kind, name, 8], (name, learned)
    # The truth: the whole network with that one tensor quantized. Weights' errors are correlated over positions, which
    # the estimate ignores, so that a factor remains.
    estimate_ranges(pair.student, images, QuantConfig(overrides={}), CPU, alone)
    for name in ("act_relu_1", "act_relu_2"):
        quantizer = pair.student.find(name)
        with float_mode(pair.student), torch.no_grad():
            quantizer.enabled = True  # type: ignore[assignment]
            true = float((pair.student(images) - pair.teacher(images)).square().sum(1).mean())
        assert 0.3 < found[name, 4].error / true < 3.0, name


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scores", [True, False])
def test_the_divergence_is_that_of_the_whole_network_with_one_tensor_quantized(learned: bool, scores: bool) -> None:
    images, bits = tiny_images(70), 2  # more than one chunk
    net, pair = sure(), build_chain(sure(), QuantConfig(), "block", is_part=not scores)
    lost = lost_by(pair, images, learned)

    @torch.no_grad()
    def true(got: Tensor) -> float:
        wanted = sure()(images)
        if not scores:
            return float((wanted - got.view_as(wanted)).square().sum(1).mean())
        wanted, got = wanted.log_softmax(1), got.log_softmax(1)
        return float((wanted.exp() * (wanted - got)).sum(1).mean())

    weight = net.get_submodule("blocks.0.conv2").weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        scale, zero_point = (x.view(-1, 1, 1, 1) for x in weight_qparams(weight, "mse", bits, False, True))
        rounded = (((weight / scale).round() + zero_point).clamp(0, 3) - zero_point) * scale
        weight += (LEARNED[bits] ** 0.5 if learned else 1.0) * (rounded - weight)
        assert lost["weight", "blocks.0.conv2", bits] == pytest.approx(true(net(images)), rel=1e-3)
    # An activation's, with its quantizer switched on in the float network.
    estimate_ranges(pair.student, images, QuantConfig(), CPU, alone)
    quantizer = pair.student.find("act_relu_1")
    assert isinstance(quantizer, ActQuantizer)
    with float_mode(pair.student), torch.no_grad():
        quantizer.enabled = True
        got = pair.student(images)
    assert lost["activation", "act_relu_1", 4] == pytest.approx(true(got), rel=1e-3)


def plan(name: str, reads: str, parameters: int, bits: tuple[int, int] = (4, 4), **options: Any) -> LayerPlan:
    return LayerPlan(name, "Conv2d", 0, *bits, parameters, reads, **options)


# Two that read the same, one whose weight is fixed, one whose activation is, and one that is fixed wholly.
LAYERS = (
    plan("a", "q", 10),
    plan("b", "q", 30),
    plan("c", "r", 5, (6, 4), fixed=frozenset({"weight_bits"})),
    plan("d", "s", 9, (4, 5), fixed=frozenset({"act_bits"})),
    plan("f", "t", 7, (8, 8), fixed=frozenset({"weight_bits", "act_bits"})),
    plan("g", "s", 2, (4, 5), fixed=frozenset({"weight_bits"})),  # reads what is fixed for "d"
)
COUNTS = Counts(
    {"a": 100, "b": 50, "c": 70, "d": 40, "f": 1000, "g": 10}, {"q": 20, "r": 35, "s": 5, "t": 11, "unread": 99}
)


def random_costs(seed: int) -> Divergences:
    generator, found = torch.Generator().manual_seed(seed), Divergences()
    tensors: list[tuple[Kind, str]] = [("weight", name) for name in "abd"]
    for tensor in [*tensors, ("activation", "q"), ("activation", "r")]:
        costs = torch.rand(len(BITS), generator=generator).sort(descending=True).values.tolist()
        found |= {(*tensor, bits): cost for bits, cost in zip(BITS, costs, strict=True)}  # type: ignore[misc]
    return found


@pytest.mark.parametrize("budget", ["bops", "memory", "size"])
@pytest.mark.parametrize("average", [2.0, 3.0, 4.5, 8.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_allocation_is_the_best_of_all(budget: Any, average: float, seed: int) -> None:
    found = random_costs(seed)
    lost = {(name, bits): cost for (_, name, bits), cost in found.items()}
    free = "abd" if budget == "size" else "abdqr"

    def price(a: float, b: float, d: float, q: float = 4, r: float = 4) -> float:
        if budget == "bops":
            return 100 * a * q + 50 * b * q + 70 * 6 * r + 40 * d * 5 + 1000 * 8 * 8 + 10 * 4 * 5
        weights = 10 * a + 30 * b + 5 * 6 + 9 * d + 7 * 8 + 2 * 4
        return weights if budget == "size" else weights + 20 * q + 35 * r + 5 * 5 + 11 * 8

    limit, best = price(*[average] * len(free)), float("inf")
    for widths in itertools.product(BITS, repeat=len(free)):
        if price(*widths) <= limit + 1e-9:
            best = min(best, sum(lost[name, bits] for name, bits in zip(free, widths, strict=True)))
    chosen = allocate(LAYERS, found, COUNTS, average, budget)
    assert chosen.divergence == pytest.approx(best, rel=1e-6)
    assert "".join(chosen.weights) + "".join(chosen.activations) == free
    spent = price(*(chosen.weights | chosen.activations).values())
    assert spent <= limit * (1 + 1e-6)
    assert chosen.cost == pytest.approx(spent / {"bops": 1270, "memory": 63 + 71, "size": 63}[budget])


@pytest.mark.parametrize("worst", [1e3, 1e6, 1e9])
def test_one_tensor_that_explodes_leaves_the_others_the_best_bits(worst: float) -> None:
    found = random_costs(1)
    expected = allocate(LAYERS, found, COUNTS, 4.0, "bops")
    found["weight", "d", 2] = worst
    chosen = allocate(LAYERS, found, COUNTS, 4.0, "bops")
    assert chosen.weights["d"] > 2
    found["weight", "d", 2] = 10.0  # too much as well, and nothing that a solver could lose the others behind
    assert chosen == allocate(LAYERS, found, COUNTS, 4.0, "bops")
    assert chosen.divergence < expected.divergence + 1.0


@pytest.mark.parametrize("worst", [float("inf"), float("nan")])
def test_bits_at_which_predictions_overflow_are_not_chosen(worst: float) -> None:
    cheap = {key: 0.0 if key[2] == 2 else cost + 5.0 for key, cost in random_costs(0).items()}
    assert allocate(LAYERS, cheap, COUNTS, 3.0, "bops").weights["a"] == 2
    cheap["weight", "a", 2] = worst
    chosen = allocate(LAYERS, cheap, COUNTS, 3.0, "bops")
    assert chosen.weights["a"] > 2
    assert math.isfinite(chosen.divergence)
    # Where nothing else is cheap enough they are, and what is written down has no number for it.
    only = allocate(LAYERS[:2], cheap, COUNTS, 2.0, "bops")
    assert only.weights["a"] == 2
    data = front_data(Front([Sensitivity("a", "weight", "u", 2, 1.0, 0.0)], cheap, {2.0: only}, "bops", False, {}))
    assert (data["front"][0]["divergence"], data["sensitivities"][0]["divergence"]) == (None, None)


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(PTQError, match="overrides give the bits of every layer"):
        allocate(LAYERS[4:5], {}, COUNTS, 3.0, "bops")
    with pytest.raises(PTQError, match="overrides give the bits of every layer"):  # before anything is measured
        choices(LAYERS[4:5], "bops")
    for wrong in (9, "3"):
        with pytest.raises(PTQError, match=r"average_bits=.+ is no number from 2 to 8"):
            QuantConfig(average_bits=wrong)  # type: ignore[arg-type]
    with pytest.raises(PTQError, match="budget='money' is unknown"):
        QuantConfig(budget="money")  # type: ignore[arg-type]


def mixed(**changes: Any) -> PTQModule:
    settings: dict[str, Any] = {"steps_per_unit": 6, "batch_size": 8, "seed": 3}
    return PTQModule(tiny_net(), QuantConfig(2, 2, average_bits=3.0), **(settings | changes))


def test_a_fit_chooses_bits_once_and_a_checkpoint_keeps_them(tmp_path: Path) -> None:
    whole = mixed()
    trainer(tmp_path / "whole").fit(whole, datamodule=tiny_data())
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    chosen = summary["bits"]
    assert chosen["weights"].keys() == {f"blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2)}
    costs = counts_of(whole.student, (3, 8, 8)).multiply_adds
    reads = {layer.name: layer.reads for layer in whole.chains.layers}
    spent = sum(costs[n] * w * chosen["activations"][reads[n]] for n, w in chosen["weights"].items())
    assert spent <= 9 * sum(costs[n] for n in chosen["weights"])
    for name, bits in chosen["activations"].items():
        assert len(whole.student.find(name)(torch.linspace(-9, 9, 5000)).unique()) <= 2**bits  # type: ignore[operator]

    stopped = mixed()
    trainer(tmp_path / "stopped", max_steps=8).fit(stopped, datamodule=tiny_data())
    resumed, last = mixed(), tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    trainer(tmp_path / "stopped").fit(resumed, datamodule=tiny_data(), ckpt_path=last)
    assert_equal_states(quantization_state(whole), quantization_state(resumed))
    assert resumed.session.bits == whole.session.bits


def test_a_budget_of_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path).fit(PTQModule(tiny_net(), QuantConfig(budget="size"), "nearest"), datamodule=tiny_data())
    assert "quant.budget='size' bounds nothing without average_bits" in caplog.text


def test_bits_are_given_by_name() -> None:
    pair = chains()
    apply(pair.student, {"blocks.0.conv1": 3}, {"act_relu_1": 5})
    layer = pair.student.find("blocks.0.conv1").weight_quantizer
    assert (layer.bits, layer.qmin, layer.qmax) == (3, 0, 7)  # type: ignore[union-attr]
    assert pair.student.find("act_relu_1").qmax == 31


def test_the_front_falls_and_is_written_down(tmp_path: Path) -> None:
    front = pareto_front(chains(), tiny_images(32), QuantConfig(), CPU, learned=True)
    costs = [best.divergence for best in front.best.values()]
    assert costs == sorted(costs, reverse=True)
    text = front_text(front)
    assert "blocks.0.conv1" in text
    assert "unit, all its tensors" in text
    assert text.endswith("Bits that edges or overrides give are not chosen, and count: stem, fc")
    assert "not chosen" not in front_text(replace(front, given=()))
    plot_front(replace(front, best={3.0: Allocation({}, {}, -1e-9, 9.0)}), tmp_path / "nothing.png")  # warns of no log
    plot_front(front, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5000
    read_by = {row["name"]: row["read_by"] for row in front_data(front)["sensitivities"] if row["kind"] == "activation"}
    for quantizer, layers in read_by.items():
        assert f"into {layers[0]} +{len(layers) - 1}".removesuffix(" +0") in text
        for layer in layers:  # is the name that overrides take
            student = chains(QuantConfig(overrides={layer: {"act_bits": 5}}, edges="same")).student
            assert student.find(quantizer).bits == 5  # type: ignore[union-attr]


def test_where_overrides_leave_nothing_to_choose_nothing_is_measured() -> None:
    quant = QuantConfig(overrides={"*": {"weight_bits": 8}})  # activations are left
    assert not pareto_front(chains(quant), tiny_images(32), quant, CPU, learned=True).best[3.0].weights
    quant = QuantConfig(overrides={"*": {"weight_bits": 8, "act_bits": 8}})
    with pytest.raises(PTQError, match="nothing to choose"):
        pareto_front(chains(quant), torch.empty(0), quant, CPU, learned=True)
