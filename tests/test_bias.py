"""Bias correction: every channel of every layer has the teacher's mean, and that alone is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import CalibrationDataModule, PTQModule, QuantConfig
from lightning_ptq.layers import quantized_layers
from lightning_ptq.quantizers import act_quantizers, weight_quantizers
from tests.helpers import tiny_data, tiny_images, tiny_module, trainer


def layer_outputs(network: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """What each named layer gives in a pass of the whole network."""
    found: dict[str, Tensor] = {}
    layers = {name.split(".", 2)[2]: m for name, m in network.named_modules() if name.split(".", 2)[-1] in names}
    hooks = [m.register_forward_hook(lambda _, __, out, n=n: found.update({n: out})) for n, m in layers.items()]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return found


def fitted(folder: Path, **changes: Any) -> PTQModule:
    module = tiny_module(QuantConfig(weight_bits=3, act_bits=3, edges="same"), method="nearest", **changes)
    trainer(folder, logger=False).fit(module, datamodule=tiny_data())
    return module


def test_every_channel_has_the_teachers_mean(tmp_path: Path) -> None:
    module, plain = fitted(tmp_path / "corrected", corrections=True), fitted(tmp_path / "plain")
    assert all(report.accepted for report in module.reports)
    images = tiny_images(40)  # those of `tiny_data`
    names = [layer.name for layer in module.chains.layers]
    wanted, found = (layer_outputs(chain, names, images) for chain in (module.teacher, module.student))
    without = layer_outputs(plain.student, names, images)
    assert set(wanted) == set(names)
    for name in names:
        dims = [dim for dim in range(wanted[name].dim()) if dim != 1]
        means = [outputs[name].mean(dims) for outputs in (wanted, found, without)]
        torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-4)
        assert float((means[2] - means[0]).abs().max()) > 1e-3, name


class Excited(nn.Module):
    """A layer deeper in modules than those before and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self.inner = nn.ModuleDict({"deep": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x * torch.sigmoid(self.inner["deep"](x.mean((2, 3))))[:, :, None, None]
        return self.last(x).mean((2, 3))


def test_layers_are_corrected_in_the_order_in_which_they_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quant = QuantConfig(weight_bits=2, act_bits=3, edges="same")
    module = PTQModule(Excited().eval(), quant, method="nearest", corrections=True, granularity="net", batch_size=8)
    trainer(tmp_path, logger=False).fit(module, datamodule=tiny_data())
    names = [layer.name for layer in module.chains.layers]
    assert [name for name, _ in quantized_layers(module.student.units[0])] != names, "nothing is shown otherwise"
    wanted, found = (layer_outputs(chain, names, tiny_images(40)) for chain in (module.teacher, module.student))
    for name in names:
        dims = [dim for dim in range(wanted[name].dim()) if dim != 1]
        torch.testing.assert_close(found[name].mean(dims), wanted[name].mean(dims), rtol=1e-5, atol=1e-6)


def test_nothing_but_biases_changes(tmp_path: Path) -> None:
    module, plain = fitted(tmp_path / "corrected", corrections=True), fitted(tmp_path / "plain")
    different = {
        name.rpartition(".")[2]
        for name, value in module.student.state_dict().items()
        if not torch.equal(value, plain.student.state_dict()[name])
    }
    assert different == {"bias_shift"}
    # Where nothing is corrected, biases steer clear of ties, less than a thousandth of a step away.
    moved = max(float(q.bias_shift.abs().max()) for q in weight_quantizers(plain.student))
    assert moved < 1e-3 * max(float(q.scale) for q in act_quantizers(plain.student))
    summary = json.loads(next((tmp_path / "corrected").rglob("summary.json")).read_text())
    assert summary["units"][-1]["mse_after"] < summary["units"][-1]["mse_before"]


@pytest.mark.parametrize("windows", [1, 4])
def test_linear_layers_over_tokens_and_windows_are_corrected_too(tmp_path: Path, windows: int) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 9, bias=False), nn.Linear(15, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).flatten(2).transpose(1, 2)  # (N, 16, 6)
            y = torch.relu(self.b(x.reshape(-1, 16 // windows, 6)))  # (N * windows, 16 / windows, 9)
            return self.head(torch.cat([x, y.reshape(-1, 16, 9)], -1).mean(1))

    torch.manual_seed(0)
    module = PTQModule(
        Tokens().eval(), QuantConfig(weight_bits=2, act_bits=3), "nearest", corrections=True, batch_size=8, seed=0
    )
    images = tiny_images(40)
    data = CalibrationDataModule.from_loaders(images.split(8), None, calibration_samples=40)
    trainer(tmp_path, logger=False).fit(module, datamodule=data)
    wanted, found = (layer_outputs(chain, ["b"], images)["b"] for chain in (module.teacher, module.student))
    torch.testing.assert_close(found.mean((0, 1)), wanted.mean((0, 1)), rtol=1e-4, atol=1e-4)
    assert all(report.accepted for report in module.reports)
    shifts = dict(quantized_layers(module.student))
    assert any(layer.weight_quantizer.bias_shift.any() for layer in shifts.values())
