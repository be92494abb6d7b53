"""The last epoch: the whole network against its own output."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQError, PTQModule, QuantConfig
from lightning_ptq.layers import quantize_layer, quantized_layers
from lightning_ptq.losses import feature_loss, prediction_loss
from lightning_ptq.quantizers import act_quantizers, weight_quantizers
from lightning_ptq.ranges import weight_qparams
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
    return fitted(tmp_path_factory.mktemp("network"), network_steps=150, network_lr=5e-3)


def divergence(module: PTQModule) -> float:
    """KL divergence of the student's predictions on the calibration images, from its definition."""
    images = tiny_images(40)
    with torch.no_grad():
        p, q = module.teacher(images).double().softmax(1), module.student(images).double().softmax(1)
    return float((p * (p / q).log()).sum(1).mean())


def test_prediction_loss_is_the_divergence_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, 3, generator=generator).double().unbind(0)
    expected = []
    for image in range(6):
        for position in range(3):
            p = [float(v) for v in teacher[image, :, position].exp()]
            q = [float(v) for v in student[image, :, position].exp()]
            pairs = [(a / sum(p), b / sum(q)) for a, b in zip(p, q, strict=True)]
            expected.append(sum(a * float(torch.tensor(a / b).double().log()) for a, b in pairs))
    assert float(prediction_loss(student, teacher)) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert float(prediction_loss(teacher, teacher)) == pytest.approx(0.0, abs=1e-6)


def test_feature_loss_is_relative_and_ignores_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 4, 5, 5, generator=generator).unbind(0)
    means = [t.mean((2, 3)) for t in (student, teacher)]
    expected = float((means[0] - means[1]).pow(2).sum() / means[1].pow(2).sum())
    assert float(feature_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(feature_loss(8 * student, 8 * teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(feature_loss(student.flip(2), teacher)) == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(feature_loss(student, torch.zeros_like(teacher)))


def test_the_last_epoch_brings_predictions_closer(units_only: PTQModule, with_network: PTQModule) -> None:
    assert with_network.reports[-1].accepted
    assert divergence(with_network) < 0.85 * divergence(units_only)


def test_it_moves_scales_gains_and_biases_and_no_rounding(units_only: PTQModule, with_network: PTQModule) -> None:
    before, after = quantization_state(units_only), quantization_state(with_network)
    changed = {key.rsplit(".", 1)[1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"log_scale", "log_gain", "bias_shift"}


def test_adaround_learns_no_activation_scales_here_either(tmp_path: Path) -> None:
    module = fitted(tmp_path, method="adaround", network_steps=60)
    assert all(torch.equal(q.log_scale, q.initial_log_scale) for q in act_quantizers(module.student))
    assert any(q.log_gain.any() for q in weight_quantizers(module.student))


def test_harm_is_undone(tmp_path: Path, units_only: PTQModule, capsys: pytest.CaptureFixture[str]) -> None:
    module = fitted(tmp_path, network_steps=10, network_lr=30.0)
    assert not module.reports[-1].accepted
    assert module.reports[-1].mse_after == module.reports[-1].mse_before
    assert_equal_states(quantization_state(module), quantization_state(units_only))
    assert "kept as the units left it" in capsys.readouterr().out


def test_the_report_holds_the_error_of_the_output(with_network: PTQModule) -> None:
    images = tiny_images(40)
    with torch.no_grad():
        error = (with_network(images) - with_network.teacher(images)).double()
    assert with_network.reports[-1].mse_after == pytest.approx(float(error.square().sum(1).mean()), rel=1e-4)


def test_contrastive_joins_and_is_balanced(tmp_path: Path) -> None:
    module = fitted(tmp_path, contrastive=True, network_steps=20)
    assert float(module.network_objective.ratio_sums[0, 2]) > 0


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 20),
        ({"steps_per_unit": 3}, 2),
        ({"network_steps": 7}, 7),
        ({"network_steps": 0}, 0),
        ({"method": "nearest"}, 0),
        ({"granularity": "net", "network_steps": 7}, 0),
    ],
)
def test_number_of_steps(changes: dict[str, Any], steps: int) -> None:
    assert tiny_module(**({"steps_per_unit": 40} | changes)).network_steps == steps


def test_a_validation_interval_beyond_it_is_refused_before_any_work(tmp_path: Path) -> None:
    module = tiny_module(steps_per_unit=4)
    with pytest.raises(PTQError, match="val_check_interval=3 is more than the 2 steps of the whole-network epoch"):
        trainer(tmp_path, val_check_interval=3).fit(module, datamodule=tiny_data())
    assert not module.reports


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
