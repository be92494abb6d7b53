"""A part of a model is quantized in place: detectors around their backbones, and any submodule."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import lightning_ptq as ptq
from lightning_ptq import CalibrationDataModule, PTQError, PTQModule, QuantConfig
from lightning_ptq.callbacks import joined
from lightning_ptq.cli import main
from lightning_ptq.compare import open_artifact
from lightning_ptq.config import QuantConfig as Config
from lightning_ptq.convert import convert
from lightning_ptq.export import pt2
from lightning_ptq.export.onnx import load_onnx
from lightning_ptq.export.pt2 import load_pt2
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.pack import Pack
from lightning_ptq.metrics import decibels, has_scores, signal_and_noise
from lightning_ptq.surroundings import Surroundings, likely_part, outputs_of
from tests.helpers import tiny_data, tiny_images, tiny_net, trainer


def detector() -> FasterRCNN:
    """A Faster R-CNN on a ResNet-18 with a feature pyramid and frozen batch norms, untrained but not trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=0)
        for module in backbone.modules():
            if type(module).__name__ == "FrozenBatchNorm2d":
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
        return FasterRCNN(backbone, num_classes=4, min_size=64, max_size=96, box_score_thresh=0.0).eval()


def detection_data() -> CalibrationDataModule:
    """Images for calibration; for validation lists of images, of different sizes, and of targets, as for training."""
    images = torch.rand(8, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    target = {"boxes": torch.tensor([[0.0, 0.0, 9.0, 9.0]]), "labels": torch.tensor([1])}
    pairs: Any = [(images[0], target), (images[1, :, :24], target)]
    validation = DataLoader(pairs, batch_size=2, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    return CalibrationDataModule.from_loaders(images.split(4), validation, calibration_samples=8)


def part_module(**changes: Any) -> PTQModule:
    settings: dict[str, Any] = {"steps_per_unit": 2, "batch_size": 4, "seed": 0, "granularity": "block"}
    quant = QuantConfig(weight_bits=8, act_bits=8, weight_range="minmax")  # a search takes long for so many weights
    return PTQModule(detector(), quant, **(settings | changes))


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> L.Trainer:
    """Of a detector with a quantized backbone, for tests that only look at it."""
    done = trainer(tmp_path_factory.mktemp("part"), logger=False, enable_checkpointing=True)
    done.fit(part_module(), datamodule=detection_data())
    return done


@pytest.fixture
def fitted_part(fit: L.Trainer) -> PTQModule:
    """The detector itself."""
    return cast("PTQModule", fit.lightning_module)


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_detector_with_the_teacher_in_place_of_its_backbone_detects_the_same() -> None:
    net = detector().double()
    images = [torch.rand(3, 40, 60).double(), torch.rand(3, 50, 40).double()]
    around = Surroundings(net, "backbone")
    chains = build_chain(net.backbone, Config(), "block", is_part=True)
    assert not chains.floats  # frozen batch norms are folded, though they are no batch norm of torch's
    read = around.inputs(images)
    expected, actual = net.backbone(read), outputs_of(chains.teacher, read)
    assert list(actual) == list(expected)
    for key in expected:
        same(actual[key], expected[key])
    for found, wanted in zip(around(images, chains.teacher), net(images), strict=True):
        assert len(wanted["boxes"])
        for key in wanted:
            same(found[key], wanted[key])


def test_fit_leaves_a_quantized_detector_that_a_checkpoint_brings_back(fit: L.Trainer, fitted_part: PTQModule) -> None:
    module, net = fitted_part, detector()
    before = {name: value for name, value in part_module().state_dict().items() if name.startswith("surroundings.")}
    images = [torch.rand(3, 40, 60), torch.rand(3, 50, 40)]
    with torch.no_grad():
        found, wanted = module.eval()(images), net(images)
    assert [set(f) for f in found] == [{"boxes", "labels", "scores"}] * 2
    assert any(not torch.equal(f["boxes"], w["boxes"]) for f, w in zip(found, wanted, strict=True))  # quantized
    assert before
    for name, value in before.items():
        assert torch.equal(module.state_dict()[name], value), name
    # Eight bits keep the features; there are no classes to agree on.
    assert float(fit.callback_metrics["student_sqnr_db"]) > 20
    assert not any("agreement" in key or "top1" in key for key in fit.callback_metrics)

    path = next(Path(fit.default_root_dir).rglob("last.ckpt"))
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert not any(key.startswith(("surroundings.", "teacher.")) for key in saved)
    again = PTQModule.load_from_checkpoint(path, model=net)
    with torch.no_grad():
        for f, w in zip(again(images), found, strict=True):
            assert all(torch.equal(f[key], w[key]) for key in w)


@pytest.mark.parametrize(
    ("image", "refusal"),
    [
        (torch.zeros(3, 64, 64, dtype=torch.uint8), "validation images are uint8"),
        (torch.rand(64, 64), "fails before it calls its part 'backbone': images is expected to be"),
    ],
)
def test_images_that_are_none_for_a_detector_are_refused(fitted_part: PTQModule, image: Tensor, refusal: str) -> None:
    with pytest.raises(PTQError, match=refusal):
        fitted_part.validation_step(((image,), ({},)), 0)


def test_calibration_sees_what_the_backbone_reads() -> None:
    net = detector()
    around = Surroundings(net, "backbone")
    images = torch.rand(10, 3, 32, 48)
    read = around.all_inputs(images)
    assert tuple(read.shape[1:]) == around.shape_of((3, 32, 48)) == (3, 64, 96)
    same(read, net.transform(list(images))[0].tensors)


def test_a_part_of_a_classifier_is_judged_by_the_classifier(tmp_path: Path) -> None:
    net = tiny_net()
    module = PTQModule(
        net, QuantConfig(weight_bits=8, act_bits=8), steps_per_unit=4, batch_size=8, seed=0, part="blocks"
    )
    assert module.student.names == ("0", "1")
    fit = trainer(tmp_path, logger=False)
    fit.fit(module, datamodule=tiny_data())
    assert float(fit.callback_metrics["teacher_top1"]) == 100.0  # labels are the float network's own
    assert float(fit.callback_metrics["student_agreement"]) > 90
    images = tiny_images(8, seed=5)
    with torch.no_grad():
        expected = net.fc(module.student(torch.relu(net.bn(net.stem(images)))).mean((2, 3)))
        torch.testing.assert_close(module.eval()(images), expected)


class TwoOutputs(nn.Module):
    """Features of different widths and dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        return x, self.b(x.mean((2, 3)))


@torch.no_grad()
def test_outputs_are_packed_without_loss() -> None:
    net, x = TwoOutputs().eval(), torch.randn(2, 3, 5, 5)
    chain = build_chain(net, Config(), "block", is_part=True).teacher
    packed = chain(x)
    first, second = net(x)
    assert packed.shape == (2, 7, 10)
    same(packed[:, :4, :9], first.flatten(2))
    same(packed[:, :, 9], second)
    assert not packed[:, 4:, :9].any()
    given = outputs_of(chain, x)
    assert isinstance(given, tuple)
    same(given[0], first)
    same(given[1], second)
    assert Pack(2, None)(first).shape == (2, 4, 9)


class Calls(nn.Module):
    """Calls its part as it is told to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.part = how, nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "never":
            return x
        if self.how == "attribute":
            return self.part(x.to(self.part.weight.dtype))
        if self.how == "twice":
            return self.part(x) + self.part(2 * x)
        return self.part(x[:1]) if self.how == "rows" else self.part(input=x)


IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def run_with_part(how: str) -> Tensor:
    """The model with its own part in place."""
    net = Calls(how).eval()
    output: Tensor = Surroundings(net, "part")(IMAGES, build_chain(net.part, Config(), "block", is_part=True).teacher)
    return output


def test_a_part_may_be_called_by_keyword() -> None:
    net = Calls("keyword").eval()
    teacher = build_chain(net.part, Config(), "block", is_part=True).teacher
    torch.testing.assert_close(Surroundings(net, "part")(IMAGES, teacher), net(IMAGES))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PTQModule(detector(), part="backbon"), "part='backbon' names no module of FasterRCNN.*'backbone'"),
        (lambda: PTQModule(detector(), method="pdquant"), "class scores, and a part has none"),
        (lambda: PTQModule(detector(), network_steps=5), "network_steps=5: that epoch compares class scores"),
        (lambda: PTQModule(detector().train()), "training mode"),
        (lambda: Surroundings(Calls("never").eval(), "part").shape_of((3, 4, 4)), "does not call its part 'part'"),
        (lambda: Surroundings(Calls("rows").eval(), "part").inputs(torch.ones(2, 3, 4, 4)), "a row for each image"),
        (
            lambda: Surroundings(Calls("attribute").eval(), "part").inputs(IMAGES),
            "fails before it calls its part 'part'",
        ),
        (lambda: Surroundings(tiny_net(), "blocks").inputs(torch.ones(2, 1, 8, 8)), "Check the images' size"),
        (lambda: run_with_part("twice"), "called more than once"),
        (lambda: build_chain(nn.Flatten(0).eval(), Config(), "block", is_part=True), "no layer that can be quantized"),
        (lambda: Pack(1, None)(torch.ones(4)), "a tensor without channels"),
        (lambda: build_chain(Nested().eval(), Config(), "block", is_part=True), "something else than a tensor"),
    ],
)
def test_bad_input_is_refused(make: Any, message: str) -> None:
    with pytest.raises(PTQError, match=message):
        make()


class Nested(nn.Module):
    """Returns a list in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        return {"levels": [self.conv(x), x]}


def test_only_detectors_have_a_part_by_themselves() -> None:
    assert likely_part(detector()) == "backbone"
    assert likely_part(tiny_net()) is None
    resized = nn.ModuleDict({"transform": nn.Identity(), "backbone": nn.Identity(), "head": nn.Identity()})
    assert likely_part(resized) is None
    with pytest.raises(PTQError, match="FasterRCNN"):  # all of it can't be captured
        PTQModule(detector(), part="", image_shape=(3, 32, 48))


def test_predictions_of_all_kinds_are_put_together() -> None:
    x, y = torch.zeros(2, 3), torch.ones(1, 3)
    assert torch.equal(joined([x, y]), torch.cat([x, y]))
    assert joined([[{"boxes": x}, {"boxes": y}], [{"boxes": y}]]) == [{"boxes": x}, {"boxes": y}, {"boxes": y}]
    assert joined([{"out": x}, {"out": y}]) == [{"out": x}, {"out": y}]


def test_a_checkpoint_of_other_surroundings_is_refused(tmp_path: Path) -> None:
    quant = QuantConfig(weight_bits=8, act_bits=8)
    module = PTQModule(tiny_net(), quant, "nearest", batch_size=8, seed=0, part="blocks")
    trainer(tmp_path, logger=False, enable_checkpointing=True).fit(module, datamodule=tiny_data())
    other = tiny_net()
    with torch.no_grad():
        other.stem.weight.mul_(2)
    path = next(tmp_path.rglob("last.ckpt"))
    PTQModule.load_from_checkpoint(path, model=tiny_net())
    with pytest.raises(PTQError, match="other weights"):
        PTQModule.load_from_checkpoint(path, model=other)


def test_the_model_is_not_changed() -> None:
    net = detector()
    before = deepcopy(net.state_dict())
    Surroundings(net, "backbone")
    assert type(net.backbone).__name__ == "BackboneWithFPN"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def build_detector() -> FasterRCNN:
    """For the command line."""
    return detector()


def test_plan_and_predict_from_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    for split in ("calib", "val"):
        (folder / split / "a").mkdir(parents=True)
        for i in range(4):
            pixels = torch.randint(0, 255, (32, 48, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / split / "a" / f"{i}.png")
    args = [
        "--model.model=tests.test_surroundings.build_detector",
        "--model.quant.weight_bits=8",
        "--model.quant.weight_range=minmax",
        "--model.steps_per_unit=1",
        "--model.batch_size=2",
        "--data=ImageFolderData",
        f"--data.root={folder}",
        "--data.resize=null",
        "--data.crop=null",
        "--data.calibration_samples=4",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.logger=false",
    ]
    main(["plan", *args])
    text = capsys.readouterr().out
    assert text.startswith("of the model, the part 'backbone' only: all around it stays in floating point")
    assert "3x64x96" in text
    main(["fit", *args])
    assert "output SQNR dB" in capsys.readouterr().out
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    main(["predict", *args, f"--ckpt_path={checkpoint}"])
    found = torch.load(next(tmp_path.rglob("predictions.pt")), weights_only=True)
    assert len(found) == 4
    assert all(set(image) == {"boxes", "labels", "scores"} for image in found)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_quantized_backbone_is_exported_with_all_its_outputs(
    tmp_path: Path, fitted_part: PTQModule, suffix: str
) -> None:
    pytest.importorskip("onnxruntime")
    module, path = fitted_part, tmp_path / f"backbone.{suffix}"
    export, load = (ptq.export_onnx, load_onnx) if suffix == "onnx" else (ptq.export_pt2, load_pt2)
    report = export(module, path)
    assert report.passed, report.text()
    assert report.agreement is None
    read = module.checked(torch.rand(3, 3, 32, 48))
    with torch.no_grad():
        expected = outputs_of(module.eval().student, read)
    assert len(expected) > 1
    for actual, wanted in zip(load(path)(read), expected.values(), strict=True):
        assert decibels(*signal_and_noise(actual, wanted).tolist()) > 30  # 27 layers of 8 bits: ties tell
    together = open_artifact(str(path)).run(read)
    torch.testing.assert_close(together[:, 0], torch.cat([x.flatten(1) for x in load(path)(read)], 1))
    assert not has_scores(together)
    if suffix == "onnx":
        import onnx

        assert [output.name for output in onnx.load(str(path)).graph.output] == list(expected)
    with pytest.raises(PTQError, match="only 'backbone' is quantized"):
        ptq.save_packed(module, tmp_path / "model.ptq")


def test_a_backbone_that_differs_is_found_out_and_the_unit_named(
    tmp_path: Path, fitted_part: PTQModule, monkeypatch: Any
) -> None:
    module = fitted_part

    def broken(student: Any, every_unit: bool = False) -> Any:
        model = convert(student, every_unit)
        model.get_buffer(f"{module.chains.layers[-1].name}.scale").mul_(3)
        return model

    monkeypatch.setattr(pt2, "convert", broken)
    report = ptq.export_pt2(module, tmp_path / "backbone.pt2")
    assert not report.passed
    assert report.unit == module.student.names[-1]
