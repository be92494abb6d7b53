"""Input that can't work is refused with the value, the rule and the way out; odd input that can work does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import CalibrationDataModule, PTQError, PTQModule, QuantConfig
from lightning_ptq.checks import check_trainer
from lightning_ptq.quantizers import act_quantizers, weight_quantizers
from tests.helpers import tiny_data, tiny_images, tiny_module, tiny_net, trainer


def data_of(images: Tensor) -> CalibrationDataModule:
    return CalibrationDataModule.from_loaders(images.split(16), calibration_samples=len(images))


def module_of(net: nn.Module, **changes: Any) -> PTQModule:
    settings: dict[str, Any] = {"steps_per_unit": 4, "batch_size": 8}
    return PTQModule(net.eval(), QuantConfig(2, 2), **(settings | changes))


# ---- the Trainer ----


def test_a_raw_image_loader_is_sent_to_from_loaders(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(tiny_images(), torch.zeros(40)), batch_size=8)
    with pytest.raises(PTQError, match=r"CalibrationDataModule\.from_loaders\(calib_loader, val_loader\)"):
        trainer(tmp_path).fit(tiny_module(), loader, loader)


def test_a_plain_datamodule_is_sent_to_wrap(tmp_path: Path) -> None:
    images = TensorDataset(tiny_images())
    plain = L.LightningDataModule.from_datasets(images, images, batch_size=8, num_workers=0)
    with pytest.raises(PTQError, match=r"\.wrap\(datamodule\)"):
        trainer(tmp_path).fit(tiny_module(), datamodule=plain)


def stub_trainer(**changes: Any) -> Any:
    """What `check_trainer` looks at; real strategies of this kind need several GPUs or packages."""
    usual = {
        "strategy": object.__new__(SingleDeviceStrategy),
        "precision": "32-true",
        "gradient_clip_val": None,
        "callbacks": [],
        "datamodule": tiny_data(),
    }
    return SimpleNamespace(**(usual | changes))


def test_an_ordinary_trainer_passes() -> None:
    check_trainer(stub_trainer())
    check_trainer(stub_trainer(strategy=DDPStrategy(), precision="16-mixed"))
    check_trainer(stub_trainer(gradient_clip_val=1.0))


def test_clipping_that_the_optimizer_can_not_do_is_refused() -> None:
    with pytest.raises(PTQError, match=r"gradient_clip_val=1\.0 can't be had with precision='16-mixed'"):
        check_trainer(stub_trainer(precision="16-mixed", gradient_clip_val=1.0))


@pytest.mark.parametrize(
    ("strategy", "name"),
    [(FSDPStrategy, "fsdp"), (DeepSpeedStrategy, "deepspeed"), (ModelParallelStrategy, "model_parallel")],
)
def test_sharding_strategies_are_refused(strategy: type, name: str) -> None:
    with pytest.raises(PTQError, match=rf"strategy='{name}' shards parameters.*Use 'ddp' or one device"):
        check_trainer(stub_trainer(strategy=object.__new__(strategy)))


def test_static_graph_is_refused() -> None:
    with pytest.raises(PTQError, match=r"static_graph=True .*Leave it out"):
        check_trainer(stub_trainer(strategy=DDPStrategy(static_graph=True)))


@pytest.mark.parametrize("callback", [WeightAveraging, StochasticWeightAveraging])
def test_weight_averaging_is_refused(tmp_path: Path, callback: type) -> None:
    averaging = callback(swa_lrs=0.1) if callback is StochasticWeightAveraging else callback()
    with pytest.raises(PTQError, match=f"{callback.__name__} averages parameters .*Leave it out"):
        trainer(tmp_path, callbacks=[averaging]).fit(tiny_module(), datamodule=tiny_data())


def test_true_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match=r"precision='bf16-true' .*32-true, 16-mixed, bf16-mixed"):
        trainer(tmp_path, precision="bf16-true").fit(tiny_module(), datamodule=tiny_data())


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    trainer(tmp_path).fit(tiny_module(), datamodule=tiny_data())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(PTQError, match=r"already holds a run .*default_root_dir, or continue that run with ckpt_path"):
        trainer(tmp_path).fit(tiny_module(seed=4), datamodule=tiny_data())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_holds_a_run_is_continued_with_its_checkpoint(tmp_path: Path) -> None:
    trainer(tmp_path, max_epochs=2).fit(tiny_module(), datamodule=tiny_data())
    module = tiny_module()
    trainer(tmp_path).fit(module, datamodule=tiny_data(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert len(module.reports) == 5


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps_per_unit": 0}, "steps_per_unit=0 is too small. Use 1 or more"),
        ({"batch_size": 0}, "batch_size=0 is too small. Use 1 or more"),
        ({"batch_size": -8}, "batch_size=-8 is too small"),
        ({"rounding_lr": -1e-3}, "rounding_lr=-0.001 must be a finite number that is not negative"),
        ({"scale_lr": float("nan")}, "scale_lr=nan must be a finite number"),
        ({"rounding_weight": float("inf")}, "rounding_weight=inf must be a finite number"),
    ],
)
def test_a_setting_outside_its_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PTQError, match=message):
        tiny_module(**settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PTQModule("resnet18"), "model is a str, and has to be a Module. Give the trained network itself"),
        (lambda: PTQModule(nn.Linear), "model is the class Linear, and has to be a Module"),
        (lambda: PTQModule(tiny_net(), {"weight_bits": 4}), "quant is a dict, and has to be a QuantConfig. Give Quant"),
        (lambda: PTQModule(tiny_net().bfloat16()), r"'stem.weight' is in bfloat16. Call model.float\(\) first"),
        (
            lambda: CalibrationDataModule.wrap([]),
            "wrap takes a LightningDataModule, and got list. Give loaders",
        ),
    ],
)
def test_an_argument_of_another_kind_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(PTQError, match=message):
        call()


# ---- images and weights ----


def test_fewer_images_than_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match=r"batch_size=8 needs .* 5 calibration images\. Add images .* or lower"):
        trainer(tmp_path).fit(tiny_module(), datamodule=data_of(tiny_images(5)))


def test_pixels_that_are_not_numbers_are_refused_and_the_image_named(tmp_path: Path) -> None:
    images = tiny_images()
    images[17, 0, 3, 3] = float("nan")
    with pytest.raises(PTQError, match="image 17 holds NaN or infinite pixels"):
        trainer(tmp_path).fit(tiny_module(), datamodule=data_of(images))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    net = tiny_net()
    net.blocks[1].conv1.weight.data[0, 0, 0, 0] = bad
    with pytest.raises(PTQError, match=r"blocks\.1"):
        trainer(tmp_path).fit(module_of(net), datamodule=tiny_data())


def test_weights_that_overflow_are_refused_and_the_unit_named(tmp_path: Path) -> None:
    net = tiny_net()
    net.blocks[0].conv2.weight.data.fill_(1e38)
    with pytest.raises(PTQError, match=r"unit 'blocks\.0': .*NaN or infinite"):
        trainer(tmp_path).fit(module_of(net), datamodule=tiny_data())


def test_images_with_other_channels_name_the_unit_and_the_shape(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match=r"images of shape \(1, 8, 8\) do not fit the model: unit 'stem'"):
        trainer(tmp_path).fit(tiny_module(), datamodule=data_of(tiny_images()[:, :1]))


def dead_channels() -> nn.Module:
    net = tiny_net()
    for conv in (net.stem, net.blocks[0].conv1, net.blocks[1].conv2):
        conv.weight.data[:4] = 0.0
    return net


def dead_layers() -> nn.Module:
    """Zero weights and biases everywhere but in the head."""
    net = tiny_net()
    for parameter in [*net.stem.parameters(), *net.bn.parameters(), *net.blocks.parameters()]:
        parameter.data.zero_()
    return net


def constant_activations() -> nn.Module:
    """The stem gives the same positive number everywhere."""
    net = tiny_net()
    net.bn.weight.data.zero_()
    net.bn.bias.data.fill_(0.7)
    return net


@pytest.mark.parametrize(
    ("net", "images"),
    [
        (tiny_net, torch.zeros(16, 3, 8, 8)),
        (tiny_net, torch.full((16, 3, 8, 8), -2.5)),
        (tiny_net, tiny_images(1).expand(16, -1, -1, -1)),
        (tiny_net, 1e6 * tiny_images(16)),
        (tiny_net, 1e-30 * tiny_images(16)),
        (dead_channels, tiny_images(16)),
        (dead_layers, tiny_images(16)),
        (constant_activations, tiny_images(16)),
    ],
    ids=["black", "constant", "all the same", "huge", "tiny", "dead channels", "dead layers", "constant activations"],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_odd_but_possible_input_is_calibrated_with_finite_scales(
    tmp_path: Path, net: Any, images: Tensor, symmetric: bool
) -> None:
    config = QuantConfig(2, 2, weight_symmetric=symmetric, act_symmetric=symmetric)
    module = PTQModule(net(), config, contrastive=True, steps_per_unit=4, batch_size=8)
    trainer(tmp_path).fit(module, datamodule=data_of(images))
    assert len(module.reports) == 5
    for q in [*act_quantizers(module.student), *weight_quantizers(module.student)]:
        assert q.scale.isfinite().all()
        assert (q.scale > 0).all()
    assert all(p.isfinite().all() for p in module.student.parameters())
    with torch.no_grad():
        assert module(images).isfinite().all()


@pytest.mark.parametrize("method", ["adaround", "qdrop", "flexround"])
def test_a_unit_whose_error_overflows_is_left_as_rounded_to_nearest(tmp_path: Path, method: str) -> None:
    """Activations of 1e25 have squares beyond float32: no error can be compared, and none is believed."""
    images = 1e25 * tiny_images(16)
    module = module_of(tiny_net(), method=method)
    trainer(tmp_path).fit(module, datamodule=data_of(images))
    assert not any(report.accepted for report in module.reports[:-1])
    with torch.no_grad():
        assert module(images).isfinite().all()


def test_weights_behind_the_last_activation_are_looked_at_too(tmp_path: Path) -> None:
    """What the last layer gives is observed by no quantizer."""
    net = tiny_net()
    net.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(PTQError, match=r"layer 'fc': its weight holds NaN .*Check the model's weights"):
        trainer(tmp_path).fit(module_of(net), datamodule=tiny_data())
