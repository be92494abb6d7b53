"""Two artifacts side by side: every kind opens, the figures are those of a plain computation, thresholds hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_ptq as ptq
from lightning_ptq import PTQError, QuantConfig
from lightning_ptq.cli import main
from lightning_ptq.compare import Artifact, alternately, compare, open_artifact
from tests import helpers
from tests.helpers import tiny_data, tiny_images, tiny_module, tiny_net, trainer

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One calibrated network as a file of every kind."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("files")
    module = tiny_module(QuantConfig(4, 4), steps_per_unit=3)
    trainer(folder, logger=False).fit(module, datamodule=tiny_data())
    ptq.export_onnx(module, folder / "model.onnx")
    ptq.export_pt2(module, folder / "model.pt2")
    ptq.save_packed(module, folder / "model.ptq")
    return {path.suffix: str(path) for path in folder.rglob("*.*") if path.suffix in (".onnx", ".pt2", ".ptq", ".ckpt")}


@pytest.mark.parametrize("kind", [".onnx", ".pt2", ".ptq", ".ckpt"])
def test_every_kind_of_file_is_the_same_network(files: dict[str, str], kind: str) -> None:
    images = tiny_images(20, seed=5)
    with torch.no_grad():
        expected = ptq.PTQModule.load_from_checkpoint(files[".ckpt"], model=tiny_net())(images)
    artifact = open_artifact(files[kind], tiny_net())
    torch.testing.assert_close(artifact.run(images), expected, rtol=1e-4, atol=1e-4)
    assert artifact.size == Path(files[kind]).stat().st_size


def test_the_float_model_is_what_was_given() -> None:
    net, images = tiny_net(), tiny_images(3)
    artifact = open_artifact("float", net.train())
    with torch.no_grad():
        assert torch.equal(artifact.run(images), tiny_net()(images))  # in eval mode
    assert artifact.size == sum(t.numel() * t.element_size() for t in net.state_dict().values())


def test_the_figures_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    images, labels = torch.arange(10.0).view(10, 1, 1, 1), torch.randint(0, 3, (10,))
    a, b = torch.randn(10, 3), torch.randn(10, 3)
    first, second = (
        Artifact(name, size, "PyTorch", lambda x, scores=scores: scores[x.flatten().long()])
        for name, size, scores in (("a", 100, a), ("b", 50, b))
    )
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    found = compare(first, second, batches)
    picks = [[max(range(3), key=row.__getitem__) for row in scores.tolist()] for scores in (a, b)]
    assert found.agreement == pytest.approx(10.0 * sum(p == q for p, q in zip(*picks, strict=True)))
    assert found.first.top1 == pytest.approx(10.0 * sum(p == q for p, q in zip(picks[0], labels.tolist(), strict=True)))
    assert found.second.top1 == pytest.approx(
        10.0 * sum(p == q for p, q in zip(picks[1], labels.tolist(), strict=True))
    )
    noise = sum((p - q) ** 2 for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    signal = sum(p**2 for p in a.flatten().tolist())
    assert found.sqnr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-4)
    assert (found.images, found.first.size, found.second.size) == (10, 100, 50)
    assert "10 images: " in found.text()
    assert "two runtimes" not in found.text()
    elsewhere = Artifact("b", 50, "ONNX Runtime", second.run)
    assert "Times are of two runtimes" in compare(first, elsewhere, batches).text()
    unlabelled = compare(first, second, [images])
    assert unlabelled.agreement == found.agreement
    assert unlabelled.first.top1 is None
    assert unlabelled.to_dict()["first"]["name"] == "a"


def test_pixels_without_a_label_do_not_count() -> None:
    scores = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = scores.argmax(1)
    labels[0, 0] = (labels[0, 0] + 1) % 3  # four of 32 are wrong
    labels[1, 3] = 255
    same = Artifact("a", 1, "PyTorch", lambda x: scores)
    found = compare(same, same, [(torch.zeros(2, 3, 4, 4), labels)])
    assert found.first.top1 == pytest.approx(100 * 24 / 28)
    assert found.agreement == 100.0
    assert found.sqnr_db == math.inf


def test_outputs_without_classes_have_a_ratio_only() -> None:
    depth = Artifact("a", 1, "PyTorch", lambda x: x.mean(1, keepdim=True))
    found = compare(depth, depth, [tiny_images(4)])
    assert found.agreement is None
    assert found.shortfalls(99.0, None) == []
    assert "classes" not in found.text()


def test_thresholds_name_what_falls_short() -> None:
    images = tiny_images(8)
    first, second = (
        Artifact("a", 1, "PyTorch", lambda x: x.mean((2, 3))),
        Artifact("b", 1, "PyTorch", lambda x: -x.mean((2, 3))),
    )
    found = compare(first, second, [images])
    assert found.agreement is not None
    assert found.agreement < 50
    short = found.shortfalls(99.0, 20.0)
    assert [line.split()[0] for line in short] == ["agreement", "SQNR"]
    assert found.shortfalls(None, None) == []


def test_who_is_slower_is_seen() -> None:
    def slow(x: Tensor) -> Tensor:
        for _ in range(200):
            x = x + 1
        return x

    fast_time, slow_time = alternately([lambda x: x + 1, slow], torch.zeros(1, 3, 64, 64), repeats=15)
    assert slow_time > 3 * fast_time


def test_what_cannot_be_compared_is_named(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(PTQError, match=r"'model.h5' can't be compared"):
        open_artifact("model.h5")
    with pytest.raises(PTQError, match=r"'none.onnx' is no file"):
        open_artifact("none.onnx")
    for name in ("float", files[".ptq"], files[".ckpt"]):
        with pytest.raises(PTQError, match="needs the model's code"):
            open_artifact(name)
    for suffix in (".onnx", ".pt2", ".ckpt", ".ptq"):
        damaged = tmp_path / f"damaged{suffix}"
        damaged.write_bytes(Path(files[suffix]).read_bytes()[:200])
        with pytest.raises(PTQError, match=f"damaged{suffix}' (can't be read|is damaged)"):
            open_artifact(str(damaged), tiny_net())
    other = Artifact("b", 1, "PyTorch", lambda x: torch.zeros(len(x), 7))
    with pytest.raises(PTQError, match=r"\(4, 5\) of 'float' and \(4, 7\) of 'b'"):
        compare(open_artifact("float", tiny_net()), other, [tiny_images(4)])
    with pytest.raises(PTQError, match="no images to compare on"):
        compare(other, other, [])

    class Boxes(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return [{"boxes": x}]

    with pytest.raises(PTQError, match="returns a list"):
        open_artifact("float", Boxes()).run(tiny_images(1))


def test_compare_from_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(Path(QUICKSTART).parents[1])
    run = f"--trainer.default_root_dir={tmp_path}"
    few = ["--model.steps_per_unit=3", "--data.calibration_samples=64"]
    main(["fit", "--config", QUICKSTART, run, *few, "--trainer.logger=false"])
    config, checkpoint = (str(next(tmp_path.rglob(name))) for name in ("config.yaml", "last.ckpt"))
    packed, exported = str(tmp_path / "digits.ptq"), str(tmp_path / "digits.onnx")
    for output in (packed, exported):
        main(["export", "--config", config, f"--ckpt_path={checkpoint}", f"--output={output}"])
    capsys.readouterr()
    main(["compare", "--config", config, checkpoint, packed])
    assert "797 images: 100.00 % of classes agree, SQNR inf dB" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", config, "float", packed, "--least_sqnr_db=60"])
    assert stopped.value.code == 1
    assert line_of(said := capsys.readouterr().out, "float").split()[2] == "98.87"
    assert "SQNR" in line_of(said, "NOT the same network: ")
    # Without a model, on the calibration images.
    main(["compare", exported, exported, "--data=lightning_ptq.DigitsData", "--data.calibration_samples=64"])
    assert "SQNR inf dB" in capsys.readouterr().out
    with pytest.raises(PTQError, match="needs the model's code"):
        main(["compare", exported, packed, "--data=lightning_ptq.DigitsData"])


def test_a_network_without_weights_is_the_same_in_every_command(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Tensor] = []

    def build() -> torch.nn.Module:
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 6 * 6, 2))
        made.append(net[2].weight.detach().clone())
        return net

    monkeypatch.setattr(helpers, "build", build, raising=False)
    network = ["--model.model=tests.helpers.build", f"--trainer.default_root_dir={tmp_path}"]
    data = ["--data=lightning_ptq.ImageFolderData", f"--data.root={image_folder}", "--data.resize=8", "--data.crop=8"]
    main(["plan", *network, *data])
    planned = made[-1]
    main(["compare", "float", "float", *network, *data])
    assert torch.equal(made[-1], planned)
    assert "SQNR inf dB" in capsys.readouterr().out


def line_of(text: str, start: str) -> str:
    """The one line that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


def test_a_command_that_needs_a_model_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PTQError, match=r"model.model is missing"):
        main(["fit", "--data=lightning_ptq.DigitsData"])
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.nonsense=1"])
    told = capsys.readouterr().err.splitlines()
    assert len(told) <= 3
    assert "--trainer.nonsense" in told[-1]
