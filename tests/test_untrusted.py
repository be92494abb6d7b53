"""What comes from elsewhere, be it weights, checkpoints, configs or images, runs no code and is refused by name."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from PIL import Image
from safetensors.torch import load_file, save_file

import lightning_ptq as ptq
from lightning_ptq import ImageFolderData, PTQError, PTQModule
from lightning_ptq.cli import main
from lightning_ptq.datasets import load_rgb
from lightning_ptq.export.packed import digest
from tests.helpers import TinyNet, tiny_data, tiny_module, tiny_net, trainer

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fit's folder, with a packed file."""
    folder, module = tmp_path_factory.mktemp("run"), tiny_module(steps_per_unit=2)
    trainer(folder, logger=False).fit(module, datamodule=tiny_data())
    ptq.save_packed(module, folder / "model.ptq")
    return folder


def crafted(run_folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """The fit's checkpoint with more in it."""
    checkpoint = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(checkpoint | changes, tmp_path / "crafted.ckpt")
    return tmp_path / "crafted.ckpt"


# ---- checkpoints ----


@pytest.mark.parametrize("as_module", [False, True], ids=["cli", "python"])
@pytest.mark.parametrize("command", ["fit", "validate", "predict", "export"])
def test_a_crafted_checkpoint_runs_no_code(run_folder: Path, tmp_path: Path, command: str, as_module: bool) -> None:
    path = crafted(run_folder, tmp_path, code=Bomb(tmp_path / "ran"))
    with pytest.raises(PTQError if not as_module else Exception, match=r"can't be read|[Ww]eights.only"):
        if not as_module:
            main([command, "--config", QUICKSTART, f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path}"])
        elif command == "export":
            PTQModule.load_from_checkpoint(path, model=tiny_net())
        else:
            run: Callable[..., Any] = getattr(trainer(tmp_path / "run"), command)
            run(tiny_module(steps_per_unit=2), datamodule=tiny_data(), ckpt_path=path)
    assert not (tmp_path / "ran").exists()


def test_a_crafted_checkpoint_is_not_compared(run_folder: Path, tmp_path: Path) -> None:
    path = crafted(run_folder, tmp_path, code=Bomb(tmp_path / "ran"))
    with pytest.raises(PTQError, match="can't be read"):
        main(["compare", str(path), "float", "--config", QUICKSTART])
    assert not (tmp_path / "ran").exists()


def test_settings_in_a_checkpoint_are_not_imported_and_called(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's command line takes hyperparameters of a checkpoint for settings, the model's import path included."""
    (tmp_path / "planted.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for told in ({"model": "planted.build"}, {"_class_path": "planted.Module"}):
        path = crafted(run_folder, tmp_path, hyper_parameters=told)
        with pytest.raises(PTQError, match="checkpoint was made with another|belongs to a model with other weights"):
            main(["validate", "--config", QUICKSTART, f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path}"])
        assert not (tmp_path / "ran").exists()
        assert "planted" not in sys.modules


def test_a_checkpoint_from_a_url_is_read_as_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: Any, weights_only: bool | None = None, **kwargs: Any) -> Any:
        asked.append(weights_only)  # None is no for a URL
        raise ConnectionError("stop here")

    monkeypatch.setattr(TorchCheckpointIO, "load_checkpoint", load)
    with pytest.raises(ConnectionError, match="stop here"):
        main(["validate", "--config", QUICKSTART, "--ckpt_path=http://localhost/last.ckpt",
              f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    assert asked == [True]


@pytest.mark.parametrize("told", [{}, {"structure": 3, "settings": {}}, {"structure": {"granularity": "block"}}, None])
def test_a_checkpoint_without_its_settings_is_refused(run_folder: Path, tmp_path: Path, told: Any) -> None:
    path = crafted(run_folder, tmp_path, lightning_ptq=told)
    with pytest.raises(PTQError, match="settings are not those of lightning_ptq"):
        PTQModule.load_from_checkpoint(path, model=tiny_net())


# ---- packed files ----


@pytest.mark.parametrize(
    "changes",
    [{"quant": {"evil": 1}}, {"quant": None}, {"granularity": None}, {"bits": {"weights": {}}}, {"leaf_modules": 7}],
    ids=["unknown key", "no settings", "no granularity", "half the bits", "no list"],
)
def test_a_packed_file_with_other_settings_is_refused(run_folder: Path, tmp_path: Path, changes: Any) -> None:
    """Its SHA-256 protects from damage; whoever means harm writes a new one."""
    from safetensors import safe_open

    with safe_open(str(run_folder / "model.ptq"), framework="pt") as file:
        told = json.loads(file.metadata()["lightning_ptq"])
    tensors = load_file(str(run_folder / "model.ptq"))
    text = json.dumps(told | changes, sort_keys=True)
    save_file(tensors, str(tmp_path / "bad.ptq"), {"lightning_ptq": text, "sha256": digest(tensors, text)})
    with pytest.raises(PTQError):
        ptq.load_packed(tmp_path / "bad.ptq", TinyNet())


def test_a_packed_file_with_numbers_of_another_type_is_refused(run_folder: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(run_folder / "model.ptq"), framework="pt") as file:
        text = file.metadata()["lightning_ptq"]
    tensors = load_file(str(run_folder / "model.ptq"))
    tensors["weights"] = tensors["weights"].to(torch.int16)
    save_file(tensors, str(tmp_path / "bad.ptq"), {"lightning_ptq": text, "sha256": digest(tensors, text)})
    with pytest.raises(PTQError, match="'weights' differs"):
        ptq.load_packed(tmp_path / "bad.ptq", TinyNet())


# ---- configs ----


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_a_config_s_python_tags_are_not_run(tmp_path: Path, tag: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(Path(QUICKSTART).read_text() + f"\nseed_everything: {tag} [{str(tmp_path / 'ran')!r}]\n")
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "--config", str(config)])
    assert exit_.value.code == 2
    assert "python/object" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


# ---- images ----


def encoded(kind: str) -> bytes:
    pixels = torch.randint(0, 256, (24, 20, 3), generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(file, kind)
    return file.getvalue()


FILES = {kind: encoded(kind) for kind in ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")}


@given(st.sampled_from(sorted(FILES)), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_damaged_image_is_decoded_or_named(tmp_path_factory: pytest.TempPathFactory, kind: str, data: Any) -> None:
    content = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        # Headers are short, and what they say matters more than pixels.
        place = data.draw(st.one_of(st.integers(0, 60), st.integers(0, len(content) - 1)))
        content[min(place, len(content) - 1)] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load_rgb(path).mode == "RGB"
        except PTQError as error:
            assert f"'{path}' cannot be read as an image" in str(error)  # noqa: PT017 (decoding may succeed too)


@pytest.mark.parametrize("pixels", [1.5, 3.0], ids=["PIL warns", "PIL refuses"])
def test_an_image_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: float) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(400 / pixels))
    with pytest.raises(PTQError, match=r"bomb\.png' cannot be read as an image .*decompression bomb"):
        load_rgb(tmp_path / "bomb.png")


@pytest.fixture
def partly_bad(image_folder: Path) -> Path:
    """Of 10 calibration images two cannot be read, of 4 validation images the first and the last two."""
    for name in ("calib/2.jpg", "calib/more/1.JPG", "val/cat/0.jpg", "val/dog/0.jpg", "val/dog/1.jpg"):
        (image_folder / name).write_bytes((image_folder / name).read_bytes()[:300])
    return image_folder


def folder_data(root: Path, **changes: Any) -> ImageFolderData:
    values: dict[str, Any] = {"resize": None, "crop": None, "calibration_samples": 10, "skip_bad_images": True}
    return ImageFolderData(str(root), **(values | changes))


def test_a_bad_image_is_an_error_unless_skipping_is_asked_for(partly_bad: Path) -> None:
    with pytest.raises(PTQError, match=r"cannot be read as an image"):
        folder_data(partly_bad, skip_bad_images=False).calibration_images()
    with pytest.raises(PTQError, match=r"cannot be read as an image"):
        list(folder_data(partly_bad, skip_bad_images=False).val_dataloader())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.forks)])
def test_bad_calibration_images_are_skipped_and_counted(partly_bad: Path, workers: int) -> None:
    """The draw is that of all files, less those that are bad: the good ones of a list written by hand."""
    data = folder_data(partly_bad, num_workers=workers)
    with pytest.warns(UserWarning, match=r"^2 calibration images cannot be read .*the first is '.*calib.2\.jpg'"):
        images = data.calibration_images()
    assert data.unread_images == (2, 0)
    paths = sorted(partly_bad.glob("calib/**/*.[jJ]*"), key=Path.as_posix)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    good = [paths[i] for i in order if paths[i].name not in ("2.jpg", "1.JPG") or paths[i].parent.name != "calib"]
    good = [path for path in good if path.read_bytes()[300:]]
    assert len(good) == 8
    assert torch.equal(images, torch.stack([data.transform(load_rgb(path)) for path in good]))


def test_all_processes_together_hold_the_images_of_one(partly_bad: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = folder_data(partly_bad).calibration_images()
        parts = torch.cat([folder_data(partly_bad).calibration_images(rank, 3) for rank in range(3)])
    assert sorted(image.sum().item() for image in parts) == sorted(image.sum().item() for image in whole)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_bad_validation_images_are_skipped_and_counted(partly_bad: Path, batch: int) -> None:
    data = folder_data(partly_bad, val_batch_size=batch)
    found = list(data.val_dataloader())
    assert torch.cat([labels for _, labels in found]).tolist() == [0]
    with pytest.warns(UserWarning, match=r"^3 validation images cannot be read .*cat.0\.jpg"):
        data.teardown("fit")
    assert data.unread_images == (0, 3)


def test_where_nothing_can_be_read_there_is_an_error(partly_bad: Path) -> None:
    for path in partly_bad.glob("calib/**/*.[jJ]*"):
        path.write_bytes(b"")
    with pytest.raises(PTQError, match="There are no calibration images"):
        folder_data(partly_bad).calibration_images()
    assert folder_data(partly_bad).image_shape is None


def test_a_fit_goes_without_bad_images_and_its_summary_says_so(partly_bad: Path, tmp_path: Path) -> None:
    data = folder_data(partly_bad, resize=8, crop=8, val_batch_size=1)
    module = tiny_module(steps_per_unit=2, batch_size=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path / "run", logger=False).fit(module, datamodule=data)
    told = [str(w.message) for w in caught if "cannot be read" in str(w.message)]
    assert [text.split(" cannot")[0] for text in told] == ["2 calibration images", "3 validation images"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped_images"] == {"calibration": 2, "validation": 3}
    assert summary["calibration_samples"] == 8
    assert summary["teacher_top1"] in (0.0, 100.0), "one image is left to validate on"
    assert os.listdir(tmp_path / "run")
