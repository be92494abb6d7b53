"""Validation: what counts as a label, and images and labels that do not belong to the network."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import CalibrationDataModule, PTQError, PTQModule
from lightning_ptq.calibration import observe
from lightning_ptq.memory import unit_shapes
from lightning_ptq.surroundings import Surroundings
from tests.helpers import tiny_images, tiny_module, tiny_net, trainer


def data_of(validation: DataLoader) -> CalibrationDataModule:
    return CalibrationDataModule.from_loaders([tiny_images(40)], validation, calibration_samples=40)


def test_a_label_that_no_output_stands_for_is_refused(tmp_path: Path) -> None:
    images = tiny_images(8)
    outputs = tiny_net()(images).shape[1]
    labels = torch.arange(8) + outputs - 7
    validation = DataLoader(TensorDataset(images, labels), batch_size=8)
    data = CalibrationDataModule.from_loaders([tiny_images(40)], validation, calibration_samples=40)
    with pytest.raises(PTQError, match=rf"label {outputs}, but the model's {outputs} outputs stand for labels up to"):
        trainer(tmp_path, num_sanity_val_steps=1).fit(tiny_module(), datamodule=data)


@pytest.mark.parametrize(("form", "top1"), [("plain", 75.0), ("column", 75.0), ("none", None), ("one-hot", None)])
def test_only_labels_that_say_something_count(tmp_path: Path, form: str, top1: float | None) -> None:
    net, images = tiny_net(), tiny_images(8)
    labels = net(images).argmax(1)
    labels[::2] = -1
    labels[1] = (labels[1] + 1) % 5  # the one of four that is wrong
    others = {"column": labels[:, None], "none": -torch.ones_like(labels), "one-hot": torch.eye(5)[labels]}
    labels = others.get(form, labels)
    validation = DataLoader(TensorDataset(images, labels), batch_size=8)
    data = CalibrationDataModule.from_loaders([tiny_images(40)], validation, calibration_samples=40)
    told = pytest.warns(UserWarning, match=r"labels of shape \(8, 5\) do not fit an output of shape \(8, 5\)")
    with told if form == "one-hot" else nullcontext():
        trainer(tmp_path).fit(PTQModule(net, method="nearest", batch_size=8), datamodule=data)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher_top1"] == top1
    assert (summary["student_top1"] is None) == (top1 is None)


@pytest.mark.parametrize(
    ("images", "refusal"),
    [
        ((255 * torch.rand(4, 3, 8, 8)).byte(), "validation images are uint8; the network reads floats"),
        (torch.rand(4, 1, 8, 8), r"can't take validation images of shape \(4, 1, 8, 8\): .*channels"),
        (torch.rand(4, 8, 8), r"can't take validation images of shape \(4, 8, 8\)"),
        (torch.rand(3, 8, 8), r"can't take validation images of shape \(3, 8, 8\)"),
        ([{"name": "a"}], r"a validation batch begins with a list"),
    ],
)
def test_images_that_are_none_for_the_network_are_refused(images: torch.Tensor, refusal: str, tmp_path: Path) -> None:
    with pytest.raises(PTQError, match=refusal):
        trainer(tmp_path, num_sanity_val_steps=1).fit(tiny_module(), datamodule=data_of(DataLoader(images, 4)))


def test_fewer_classes_than_outputs_are_told_once(tmp_path: Path) -> None:
    dataset = TensorDataset(tiny_images(8), torch.arange(8) % 2)
    dataset.classes = ["cat", "dog"]
    with pytest.warns(UserWarning, match="of 2 classes, and the network has 5 outputs") as told:
        trainer(tmp_path).fit(tiny_module(), datamodule=data_of(DataLoader(dataset, batch_size=2)))
    assert sum("2 classes" in str(warning.message) for warning in told) == 1


def test_a_list_of_images_is_refused_where_no_detector_reads_it(tmp_path: Path) -> None:
    validation = DataLoader(tiny_images(4), 4, collate_fn=list)
    with pytest.raises(PTQError, match="validation images are a list, as a detector reads them"):
        trainer(tmp_path, num_sanity_val_steps=1).fit(tiny_module(), datamodule=data_of(validation))


def test_fewer_classes_are_told_in_a_test_too(tmp_path: Path) -> None:
    module = tiny_module()
    trainer(tmp_path / "fit").fit(module, datamodule=data_of(DataLoader(tiny_images(4), 4)))
    dataset = TensorDataset(tiny_images(8), torch.arange(8) % 2)
    dataset.classes = ["cat", "dog"]
    with pytest.warns(UserWarning, match="of 2 classes, and the network has 5 outputs"):
        trainer(tmp_path / "test").test(module, DataLoader(dataset, batch_size=8), verbose=False)


DEVICE_FAULTS = pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])


@DEVICE_FAULTS
def test_what_a_device_says_is_not_said_of_images(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny_module()
    trainer(tmp_path / "fit").fit(module, datamodule=data_of(DataLoader(tiny_images(4), 4)))

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise kind("the device has a fault")

    monkeypatch.setattr(module.teacher, "forward", fail)
    with pytest.raises(kind, match="the device has a fault"):
        trainer(tmp_path / "test").validate(module, DataLoader(tiny_images(4), 4), verbose=False)


@DEVICE_FAULTS
def test_nor_of_calibration_images(kind: type[Exception]) -> None:
    def fail(*_: object) -> None:
        raise kind("the device has a fault")

    chain = tiny_module().student
    chain.units[1].register_forward_pre_hook(fail)
    around = Surroundings(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "1")
    around.model[0].register_forward_pre_hook(fail)
    for run in (
        lambda: observe(chain, tiny_images(4), torch.device("cpu"), lambda x: [x]),
        lambda: unit_shapes(chain, (3, 8, 8)),
        lambda: around.inputs(tiny_images(4)),
    ):
        with pytest.raises(kind, match="the device has a fault"):
            run()


def test_labels_of_text_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    validation = DataLoader([(image, "cat") for image in tiny_images(8)], batch_size=8)
    with pytest.warns(UserWarning, match="labels are text: top-1 is not measured"):
        trainer(tmp_path).fit(tiny_module(), datamodule=data_of(validation))
    assert json.loads((tmp_path / "summary.json").read_text())["student_top1"] is None
