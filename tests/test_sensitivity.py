"""Sensitivities against slow truths, allocation against brute force, and mixed precision through a fit and a resume."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQError, PTQModule, QuantConfig
from lightning_ptq.allocation import allocate, apply
from lightning_ptq.calibration import estimate_ranges
from lightning_ptq.front import front_text, pareto_front, plot_front
from lightning_ptq.graph import ChainPair, LayerPlan, build_chain
from lightning_ptq.graph.arithmetic import layer_multiply_adds
from lightning_ptq.quantizers import ActQuantizer, act_quantizers, float_mode
from lightning_ptq.ranges import weight_qparams
from lightning_ptq.sensitivity import BITS, LEARNED, Sensitivity, sensitivities
from tests.helpers import assert_equal_states, quantization_state, tiny_data, tiny_images, tiny_net, trainer

CPU = torch.device("cpu")


def alone(x: Tensor) -> Tensor:
    return x[None]


def chains(quant: QuantConfig = QuantConfig()) -> ChainPair:  # noqa: B008 (frozen)
    return build_chain(tiny_net(), quant, "block")


def measured(pair: ChainPair, images: Tensor, learned: bool = False) -> list[Sensitivity]:
    return sensitivities(pair.teacher, pair.student, images, QuantConfig(), CPU, alone, learned)


def test_every_tensor_is_measured_at_every_number_of_bits_and_nothing_is_left_behind() -> None:
    pair = chains()
    before = {name: value.clone() for name, value in pair.student.state_dict().items()}
    found = measured(pair, tiny_images(32))
    acts = [f"act_{name}" for name in ("x", "relu", "relu_1", "relu_2", "relu_3", "mean")]
    tensors = [layer.name for layer in pair.layers] + acts
    assert sorted((s.name, s.bits) for s in found) == sorted(itertools.product(tensors, BITS))
    ready = [key for key in before if key.endswith("ready")]
    after = pair.student.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in ready)
    assert {q.bits for q in act_quantizers(pair.student)} == {4, 8}
    images = tiny_images(4)
    torch.testing.assert_close(pair.student(images), pair.teacher(images))


def test_fewer_bits_cost_more_and_the_estimate_is_the_true_error_to_first_order() -> None:
    pair, images = chains(), tiny_images(256)
    found = {(s.name, s.bits): s for s in measured(pair, images)}
    for name in {s.name for s in found.values()}:
        errors = [found[name, bits].error for bits in BITS]
        assert errors == sorted(errors, reverse=True), name
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
def test_the_divergence_is_that_of_the_whole_network_with_one_tensor_quantized(learned: bool) -> None:
    def sure() -> nn.Module:  # its divergence is far above what float32 resolves
        net = tiny_net()
        net.fc.weight.data *= 30.0
        return net

    images, bits = tiny_images(70), 2  # more than one chunk
    net, pair = sure(), build_chain(sure(), QuantConfig(), "block")
    found = {(s.name, s.bits): s for s in measured(pair, images, learned)}
    with torch.no_grad():
        wanted = net(images).log_softmax(1)
    layer = net.get_submodule("blocks.0.conv2")
    with torch.no_grad():
        scale, zero_point = weight_qparams(layer.weight, "mse", bits, False, True)  # type: ignore[arg-type]
        shape = [-1, 1, 1, 1]
        steps = (layer.weight / scale.view(shape)).round() + zero_point.view(shape)  # type: ignore[operator]
        rounded = (steps.clamp(0, 3) - zero_point.view(shape)) * scale.view(shape)
        share = LEARNED[bits] ** 0.5 if learned else 1.0
        layer.weight += share * (rounded - layer.weight)  # type: ignore[operator]
        got = net(images).log_softmax(1)
    true = float((wanted.exp() * (wanted - got)).sum(1).mean())
    assert found["blocks.0.conv2", bits].divergence == pytest.approx(true, rel=1e-3)
    # An activation's, with its quantizer switched on in the float network.
    estimate_ranges(pair.student, images, QuantConfig(), CPU, alone)
    quantizer = pair.student.find("act_relu_1")
    assert isinstance(quantizer, ActQuantizer)
    with float_mode(pair.student), torch.no_grad():
        quantizer.enabled = True
        got = pair.student(images).log_softmax(1)
    true = float((wanted.exp() * (wanted - got)).sum(1).mean())
    assert found["act_relu_1", 4].divergence == pytest.approx(true, rel=1e-3)


def plan(name: str, reads: str, parameters: int, fixed: bool = False) -> LayerPlan:
    return LayerPlan(name, "Conv2d", 0, 4, 4, parameters, reads, fixed)


LAYERS = (plan("a", "q", 10), plan("b", "q", 30), plan("c", "r", 5), plan("d", "s", 9, fixed=True))
COSTS = {"a": 100, "b": 50, "c": 70, "d": 1000}


def random_errors(seed: int) -> list[Sensitivity]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for kind, names in (("weight", "abc"), ("activation", "qr")):
        for name in names:
            errors = torch.rand(len(BITS), generator=generator).sort(descending=True).values.tolist()
            found += [Sensitivity(name, kind, "u", b, e, 0.0, 0.0) for b, e in zip(BITS, errors, strict=True)]  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("budget", ["bops", "size"])
@pytest.mark.parametrize("average", [2.0, 3.0, 4.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_allocation_is_the_best_of_all(budget: Any, average: float, seed: int) -> None:
    found = random_errors(seed)
    lost = {(s.name, s.bits): s.divergence for s in found}
    best = float("inf")
    for a, b, c, q, r in itertools.product(BITS, repeat=5):
        if budget == "size" and (q, r) != (4, 4):
            continue
        cost = 100 * a * q + 50 * b * q + 70 * c * r if budget == "bops" else 10 * a + 30 * b + 5 * c
        if cost <= (220 * average**2 if budget == "bops" else 45 * average) + 1e-9:
            total = lost["a", a] + lost["b", b] + lost["c", c]
            best = min(best, total + (lost["q", q] + lost["r", r] if budget == "bops" else 0.0))
    chosen = allocate(LAYERS, found, COSTS, average, budget)
    assert chosen.divergence == pytest.approx(best, rel=1e-6)
    assert chosen.cost <= average ** (2 if budget == "bops" else 1) + 1e-6
    assert set(chosen.weights) == {"a", "b", "c"}
    assert set(chosen.activations) == {"q", "r"}


@pytest.mark.parametrize("lost", [float("inf"), float("nan")])
def test_bits_at_which_predictions_overflow_are_not_chosen(lost: float) -> None:
    cheapest = [replace(s, divergence=0.0 if s.bits == 2 else s.divergence + 5.0) for s in random_errors(0)]
    kept = [replace(s, divergence=lost) if (s.name, s.bits) == ("a", 2) else s for s in cheapest]
    assert allocate(LAYERS, cheapest, COSTS, 3.0, "bops").weights["a"] == 2
    chosen = allocate(LAYERS, kept, COSTS, 3.0, "bops")
    assert chosen.weights["a"] > 2
    assert math.isfinite(chosen.divergence)


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(PTQError, match="every layer's bits are fixed"):
        allocate((LAYERS[3],), [], COSTS, 3.0, "bops")
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
    costs = layer_multiply_adds(whole.student, (3, 8, 8))
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


def test_bits_are_given_by_name() -> None:
    pair = chains()
    apply(pair.student, {"blocks.0.conv1": 3}, {"act_relu_1": 5})
    layer = pair.student.find("blocks.0.conv1").weight_quantizer
    assert (layer.bits, layer.qmin, layer.qmax) == (3, 0, 7)  # type: ignore[union-attr]
    assert pair.student.find("act_relu_1").qmax == 31


def test_the_front_falls_and_is_written_down(tmp_path: Path) -> None:
    found, front = pareto_front(chains(), tiny_images(32), QuantConfig(), CPU, learned=True)
    lost = [best.divergence for best in front.values()]
    assert lost == sorted(lost, reverse=True)
    text = front_text(found, front, "bops")
    assert "blocks.0.conv1" in text
    assert "unit, all its tensors" in text
    plot_front(front, "bops", tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5000


def test_points_that_are_too_little_for_what_is_fixed_are_left_out() -> None:
    # Both convolutions of a block read what the first of them fixes.
    quant = QuantConfig(overrides={"blocks.0.conv1": {"act_bits": 8}, "blocks.1.*": {"weight_bits": 8}})
    _, front = pareto_front(chains(quant), tiny_images(32), quant, CPU, learned=True)
    assert front
    quant = QuantConfig(overrides={"*": {"weight_bits": 8}})
    with pytest.raises(PTQError, match="nothing is left to choose"):
        pareto_front(chains(quant), tiny_images(32), quant, CPU, learned=True)
