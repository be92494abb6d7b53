"""Images that cannot be read: each is named, or skipped and counted where that is asked for."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_ptq import ImageFolderData, PTQError
from lightning_ptq.datasets import load_rgb
from tests.helpers import tiny_module, trainer


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
    good = [paths[i] for i in order if paths[i].stat().st_size > 300]
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
