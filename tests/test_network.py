"""The last epoch: the whole network against its own output."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import Augmentation, CalibrationDataModule, PTQError, PTQModule, QuantConfig, calibration
from lightning_ptq.layers import quantize_layer, quantized_layers
from lightning_ptq.network import NetworkCache, NetworkStart, finish_network
from lightning_ptq.quantizers import act_quantizers, weight_quantizers
from lightning_ptq.ranges import weight_qparams
from lightning_ptq.store import Store
from tests.helpers import (
    TinyNet,
    assert_equal_states,
    quantization_state,
    tiny_data,
    tiny_images,
    tiny_module,
    tiny_net,
    trainer,
)


def decided_net() -> TinyNet:
    """Larger and centred logits: `tiny_net` gives all images next to the same probabilities."""
    net = tiny_net()
    with torch.no_grad():
        net.fc.weight.mul_(20.0)
        net.fc.bias.sub_(net(tiny_images(40)).mean(0))
    return net


def fitted(folder: Path, **changes: Any) -> PTQModule:
    settings: dict[str, Any] = {"method": "qdrop", "steps_per_unit": 40, "batch_size": 8, "seed": 3}
    module = PTQModule(decided_net(), QuantConfig(weight_bits=2, act_bits=2), **(settings | changes))
    trainer(folder).fit(module, datamodule=tiny_data())
    return module


@pytest.fixture(scope="module")
def units_only(tmp_path_factory: pytest.TempPathFactory) -> PTQModule:
    return fitted(tmp_path_factory.mktemp("units"), network_steps=0)


@pytest.fixture(scope="module")
def with_network(tmp_path_factory: pytest.TempPathFactory) -> PTQModule:
    return fitted(tmp_path_factory.mktemp("network"), network_steps=150, network_lr=5e-3, network_rounding_lr=0.0)


def divergence(module: PTQModule) -> float:
    """KL divergence of the student's predictions on the calibration images, from its definition."""
    images = tiny_images(40)
    with torch.no_grad():
        p, q = module.teacher(images).double().softmax(1), module.student(images).double().softmax(1)
    return float((p * (p / q).log()).sum(1).mean())


def test_the_last_epoch_brings_predictions_closer(units_only: PTQModule, with_network: PTQModule) -> None:
    assert with_network.reports[-1].accepted
    assert divergence(with_network) < 0.85 * divergence(units_only)


def test_it_moves_scales_gains_and_biases_and_no_rounding(units_only: PTQModule, with_network: PTQModule) -> None:
    before, after = quantization_state(units_only), quantization_state(with_network)
    changed = {key.rsplit(".", 1)[1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"log_scale", "log_gain", "bias_shift"}


def test_rounding_that_is_learned_again_ends_hard_and_closer(tmp_path: Path, units_only: PTQModule) -> None:
    module = fitted(tmp_path, network_steps=150)
    before, after = quantization_state(units_only), quantization_state(module)
    assert any(bool((before[key].sign() != after[key].sign()).any()) for key in before if key.endswith(".alpha"))
    assert divergence(module) < 0.85 * divergence(units_only)
    for _, layer in quantized_layers(module.student):
        q, weight = layer.weight_quantizer, layer.weight
        assert not q.straight
        distance = (q.integers(weight) - q.zero_point - weight / q.scale).abs()
        assert bool((distance[q.integers(weight).clamp(1, 2) == q.integers(weight)] <= 1).all())


def test_harm_to_the_rounding_is_undone(tmp_path: Path, units_only: PTQModule) -> None:
    module = fitted(tmp_path, network_steps=10, network_lr=30.0, network_rounding_lr=3.0)
    assert not module.reports[-1].accepted
    assert_equal_states(quantization_state(module), quantization_state(units_only))


def test_augmented_images_are_shown_to_both_networks(tmp_path: Path) -> None:
    """With a perfect student all terms are zero only if teacher and student see the same images."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    module = PTQModule(decided_net(), QuantConfig(8, 8), steps_per_unit=2, network_steps=4, batch_size=8, seed=3,
                       augment=Augmentation(flip=True, shift=2), network_features=1.0)  # fmt: skip
    whole = module.network_objective.forward
    module.network_objective.forward = lambda batch: (
        seen.append(  # type: ignore[method-assign]
            (batch.student_out.detach(), batch.teacher_out, module.session.opened.features[batch.rows])
        )
        or whole(batch)
    )  # type: ignore[func-returns-value]
    trainer(tmp_path).fit(module, datamodule=tiny_data())
    assert len(seen) == 4
    for student, teacher, cached in seen:
        torch.testing.assert_close(student, teacher, atol=0.15, rtol=0.1)
        assert not torch.allclose(module.teacher(teacher, start=len(module.teacher) - 1), cached, atol=0.1)


def test_adaround_learns_no_activation_scales_here_either(tmp_path: Path) -> None:
    module = fitted(tmp_path, method="adaround", network_steps=60)
    assert all(torch.equal(q.log_scale, q.initial_log_scale) for q in act_quantizers(module.student))
    assert any(q.log_gain.any() for q in weight_quantizers(module.student))


@pytest.mark.parametrize(
    ("changes", "in_units", "in_network"),
    [({}, True, True), ({"method": "adaround"}, False, True), ({"corrections": False}, False, False)],
)
def test_corrections_are_learned_where_activation_scales_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], in_units: bool, in_network: bool
) -> None:
    monkeypatch.setattr(calibration, "no_worse", lambda *_: True)  # what was learned is looked at, good or bad
    monkeypatch.setattr(PTQModule, "_finish_biases", lambda _: None)  # and nothing but that
    for steps, expected in ((0, in_units), (20, in_network)):
        module = fitted(tmp_path / str(steps), network_steps=steps, **changes)
        for _, layer in quantized_layers(module.student):
            q = layer.weight_quantizer
            assert bool(q.log_gain.any()) == expected
            assert bool(q.bias_shift.any()) == expected


def test_without_corrections_the_last_epoch_learns_activation_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PTQModule, "_finish_biases", lambda _: None)
    before = quantization_state(fitted(tmp_path / "units", corrections=False, network_steps=0))
    after = quantization_state(
        fitted(tmp_path / "all", corrections=False, network_steps=20, network_rounding_lr=0.0, network_features=0.0)
    )
    changed = {key.rsplit(".", 1)[1] for key in before if not torch.equal(before[key], after[key])}
    assert changed - {"ratio_sums"} == {"log_scale"}


def test_harm_is_undone(tmp_path: Path, units_only: PTQModule, capsys: pytest.CaptureFixture[str]) -> None:
    module = fitted(tmp_path, network_steps=10, network_lr=30.0)
    assert not module.reports[-1].accepted
    assert module.reports[-1].mse_after == module.reports[-1].mse_before
    assert_equal_states(quantization_state(module), quantization_state(units_only))
    assert "kept as the units left it" in capsys.readouterr().out


def cache_of(module: PTQModule, images: Tensor) -> NetworkCache:
    """The last epoch's; the first 40 images are drawn, the others judge."""
    with torch.no_grad():
        head_in, features = module.teacher(images, stop=len(module.teacher) - 1), module.teacher(images)
    return NetworkCache(module.student, images, head_in, features, Store(torch.device("cpu")), drawn=40)


@pytest.mark.parametrize(("factor", "accepted"), [(0.9, True), (0.5, False)])
def test_a_small_rise_of_the_divergence_is_no_harm(with_network: PTQModule, factor: float, accepted: bool) -> None:
    cache = cache_of(deepcopy(with_network), tiny_images(40))
    now = NetworkStart.of(cache, cache.student_out(), lambda x: x)
    before = NetworkStart(now.learned, factor * now.prediction, now.mse)
    assert finish_network(cache, before, lambda x: x)[0].accepted == accepted


@pytest.mark.parametrize(("shift", "accepted"), [(0.01, True), (3.0, False)])
def test_outputs_that_drift_together_are_harm(
    with_network: PTQModule, monkeypatch: pytest.MonkeyPatch, shift: float, accepted: bool
) -> None:
    """No prediction shows it: they need be no scores of classes."""
    cache = cache_of(deepcopy(with_network), tiny_images(40))
    before = cache.student_out()
    start = NetworkStart.of(cache, before, lambda x: x)
    monkeypatch.setattr(NetworkCache, "student_out", lambda _: before + shift)
    assert finish_network(cache, start, lambda x: x)[0].accepted == accepted


@pytest.mark.parametrize(("worse", "accepted"), [(2, True), (40, False)], ids=["some by chance", "all"])
def test_what_is_held_out_undoes_harm_but_not_chance(
    with_network: PTQModule, monkeypatch: pytest.MonkeyPatch, worse: int, accepted: bool
) -> None:
    """So many of the 40 images that judge get worse; those that are drawn stay as they are."""
    cache = cache_of(deepcopy(with_network), tiny_images(80))
    before = cache.student_out()
    after = before.clone()
    after[40 : 40 + worse] = -cache.features[40 : 40 + worse]
    start = NetworkStart.of(cache, before, lambda x: x)
    monkeypatch.setattr(NetworkCache, "student_out", lambda _: after)
    kept = [parameter.clone() for parameter in cache.learned]
    assert finish_network(cache, start, lambda x: x)[0].accepted == accepted
    assert all(torch.equal(a, b) for a, b in zip(kept, cache.learned, strict=True))


def test_the_report_holds_the_error_of_the_output(with_network: PTQModule) -> None:
    images = tiny_images(40)
    with torch.no_grad():
        error = (with_network(images) - with_network.teacher(images)).double()
    # Biases are finished behind the judgement.
    assert with_network.reports[-1].mse_after == pytest.approx(float(error.square().sum(1).mean()), rel=1e-2)


def test_contrastive_joins_and_is_balanced(tmp_path: Path) -> None:
    module = fitted(tmp_path, contrastive=True, network_steps=20)
    assert float(module.network_objective.ratio_sums[0, -1]) > 0


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 40),
        ({"steps_per_unit": 3}, 3),
        ({"steps_per_unit": 500}, 224),
        ({"steps_per_unit": 20000}, 2500),
        ({"method": "adaround", "corrections": False}, 40),
        ({"method": "adaround", "corrections": False, "network_rounding_lr": 0.0}, 0),
        ({"network_steps": 7}, 7),
        ({"network_steps": 0}, 0),
        ({"method": "nearest"}, 0),
        ({"granularity": "net"}, 0),
    ],
)
def test_number_of_steps(changes: dict[str, Any], steps: int) -> None:
    assert tiny_module(**({"steps_per_unit": 40} | changes)).network_steps == steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_check_interval": 3}, "val_check_interval=3 is more than the 2 batches of the whole-network epoch"),
        ({"limit_train_batches": 0.25}, "limit_train_batches=0.25 leaves nothing of the 2 batches"),
    ],
)
def test_a_trainer_that_it_does_not_fit_is_refused_before_any_work(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    module = tiny_module(steps_per_unit=4, network_steps=2)
    with pytest.raises(PTQError, match=message):
        trainer(tmp_path, **settings).fit(module, datamodule=tiny_data())
    assert not module.reports
    # Without that epoch there is nothing to refuse.
    trainer(tmp_path, **settings, max_epochs=1).fit(module, datamodule=tiny_data())


def test_a_single_unit_has_no_such_epoch() -> None:
    with pytest.raises(PTQError, match="network_steps=7 needs two units or more, but granularity='net'"):
        tiny_module(granularity="net", network_steps=7)
    with pytest.raises(PTQError, match="network_steps=7 has nothing to learn with scales='none', corrections=Fal"):
        tiny_module(method="adaround", corrections=False, network_steps=7, network_rounding_lr=0.0)


@pytest.mark.parametrize("name", ["network_lr", "network_rounding_lr", "network_features"])
@pytest.mark.parametrize("value", [None, True, -1.0])
def test_rates_of_the_last_epoch_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(PTQError, match=f"{name}={value} must be a"):
        tiny_module(**{name: value})


def test_the_whole_network_is_trained_in_float32(tmp_path: Path) -> None:
    """So that units which learn nothing (no rates) leave the same network whatever the precision."""
    states = []
    for precision in ("32-true", "bf16-mixed"):
        module = tiny_module(steps_per_unit=1, rounding_lr=0.0, scale_lr=0.0, network_steps=4)
        trainer(tmp_path / precision, precision=precision).fit(module, datamodule=tiny_data())
        states.append(quantization_state(module))
    assert any(state.any() for name, state in states[0].items() if name.endswith("log_gain"))
    assert_equal_states(*states)


def test_changed_images_meet_a_teacher_in_full_precision(tmp_path: Path) -> None:
    module = tiny_module(network_steps=2, augment=Augmentation(shift=1))
    kinds: list[torch.dtype] = []
    whole = module.network_objective.forward
    module.network_objective.forward = lambda batch: (
        kinds.extend(  # type: ignore[method-assign]
            (batch.teacher_out.dtype, batch.teacher_features.dtype)
        )
        or whole(batch)
    )  # type: ignore[func-returns-value]
    trainer(tmp_path, precision="bf16-mixed").fit(module, datamodule=tiny_data())
    assert kinds == [torch.float32] * 4
    assert module.session.state()["network_start"] is None, "what only the judgement needed does not stay"


def test_an_augmentation_that_can_do_nothing_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match="augment changes images in the last epoch, and there is none"):
        tiny_module(augment=Augmentation(flip=True), network_steps=0)
    module = tiny_module(augment=Augmentation(shift=8))
    with pytest.raises(PTQError, match="shift=8 needs larger images than 8 x 8"):
        trainer(tmp_path).fit(module, datamodule=tiny_data())
    assert not module.reports


def test_images_are_opened_once(tmp_path: Path) -> None:
    """A stream gives them only once."""
    stream = iter(tiny_images(40).split(16))
    module = tiny_module()
    data = CalibrationDataModule.from_loaders(stream, calibration_samples=40)
    trainer(tmp_path).fit(module, datamodule=data)
    assert module.reports[-1].name == "whole-network"


@pytest.mark.parametrize("changes", [{"rounding": "nearest", "scales": "joint"}, {"contrastive": True}])
def test_layers_without_bias_and_per_tensor_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    module = PTQModule(
        net.eval(), QuantConfig(3, 3, weight_per="tensor"), steps_per_unit=8, batch_size=8, seed=0, **changes
    )
    data = CalibrationDataModule.from_loaders(tiny_images(40).split(16), calibration_samples=40)
    trainer(tmp_path).fit(module, datamodule=data)
    x = tiny_images(4)
    with torch.no_grad():
        assert torch.isfinite(module(x)).all()
    assert module.reports[-1].name == "whole-network"


def test_gains_have_gradients_in_half_precision() -> None:
    layer = nn.Conv2d(2, 2, 1, bias=False)
    layer.weight.data.fill_(1.0)
    twin = quantize_layer(layer, 8, QuantConfig(8, 8))
    q = twin.weight_quantizer
    q.set_range(layer.weight, *weight_qparams(layer.weight, "minmax", 8, False, True))
    q.log_gain.requires_grad_(True)
    q.bias_shift.requires_grad_(True)
    x = torch.ones(1, 2, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = twin(x)
    (gradient,) = torch.autograd.grad(out.sum(), q.log_gain)
    torch.testing.assert_close(gradient.flatten(), torch.full((2,), 32.0), rtol=1e-2, atol=0)


def test_gains_and_shifts_fold_into_scales_and_biases(with_network: PTQModule) -> None:
    """The finished student is a plain quantized network: integers, scales, biases."""
    for _, layer in quantized_layers(with_network.student):
        q = layer.weight_quantizer
        weight, bias = layer.quantized()
        scale: Tensor = q.scale * q.log_gain.exp()
        assert torch.equal(q.effective_scale, scale)
        torch.testing.assert_close(weight, (q.integers(layer.weight) - q.zero_point) * scale)
        torch.testing.assert_close(bias, layer.bias + q.bias_shift)


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 1, bias=False), nn.Linear(4, 6)])
def test_gains_on_the_output_are_gains_on_the_weight(layer: nn.Module, per: Any) -> None:
    """Values and gradients of a step, against the layer that the definition gives."""
    generator = torch.Generator().manual_seed(0)
    twin = quantize_layer(layer, 3, QuantConfig(3, 3, weight_per=per))
    q = twin.weight_quantizer
    q.set_range(layer.weight, *weight_qparams(layer.weight, "minmax", 3, False, per == "channel"))
    for parameter in (q.log_gain, q.bias_shift):
        parameter.data.normal_(0.0, 0.3, generator=generator)
        parameter.requires_grad_(True)
    linear = isinstance(layer, nn.Linear)
    x = torch.randn(5, *((4,) if linear else (4, 7, 7)), generator=generator)

    weight = (q.integers(layer.weight) - q.zero_point) * q.scale * q.log_gain.exp()
    bias = q.bias_shift if layer.bias is None else layer.bias + q.bias_shift
    function = nn.functional.linear if linear else partial(nn.functional.conv2d, groups=layer.groups)
    expected, out = function(x, weight, bias), twin(x)
    torch.testing.assert_close(out, expected)
    direction = torch.randn(out.shape, generator=generator)
    learned = [q.log_gain, q.bias_shift]
    torch.testing.assert_close(
        torch.autograd.grad(out, learned, direction), torch.autograd.grad(expected, learned, direction)
    )
    with torch.no_grad():
        torch.testing.assert_close(twin(x), expected)
