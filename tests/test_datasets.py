from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

from lightning_ptq.datasets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageFiles,
    cifar10,
    digits,
    eval_transform,
    image_of,
    labelled_images,
    load_rgb,
    stack_images,
)
from lightning_ptq.demo.train_digits import WEIGHTS, top1
from lightning_ptq.errors import PTQError
from lightning_ptq.models import digits_net

HALF = (0.5, 0.5, 0.5)


def test_normalised_pixels_are_those_of_torchvision() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    slow = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])
    assert torch.equal(eval_transform(mean, std)(image), slow(image))


def test_the_transform_agrees_with_pil_and_arithmetic(write_image, tmp_path: Path) -> None:
    image = load_rgb(write_image(tmp_path / "a.png", size=(40, 20)))
    got = eval_transform(IMAGENET_MEAN, IMAGENET_STD, resize=10, crop=8)(image)
    resized = image.resize((20, 10), Image.Resampling.BILINEAR).crop((6, 1, 14, 9))
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    expected = (tv.pil_to_tensor(resized).double() / 255 - mean) / std
    assert got.shape == (3, 8, 8)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_resize_and_crop_the_size_stays(write_image, tmp_path: Path) -> None:
    image = load_rgb(write_image(tmp_path / "a.png", size=(7, 5)))
    assert eval_transform(HALF, HALF)(image).shape == (3, 5, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 0}, "data.resize=0 "),
        ({"crop": -1}, "data.crop=-1 "),
        ({"resize": 8, "crop": 9}, "data.crop=9 is larger than data.resize=8"),
        ({"std": (0.5, 0.0, 0.5)}, "std > 0"),
        ({"mean": (float("nan"), 0.5, 0.5)}, "finite means"),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "Divide those of values up to 255 by 255"),
        ({"std": (58.4, 57.1, 57.4)}, "none of values on [0, 1]"),
    ],
)
def test_a_transform_that_cannot_work_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PTQError, match=re.escape(message)):
        eval_transform(**{"mean": HALF, "std": HALF, **options})


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_is_decoded_as_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (4, 3)).save(path)
    assert load_rgb(path).mode == "RGB"


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "truncated"])
def test_a_broken_image_is_named(content: bytes | None, write_image, tmp_path: Path) -> None:
    path = write_image(tmp_path / "broken.jpg", size=(64, 64))
    path.write_bytes(path.read_bytes()[:900] if content is None else content)
    with pytest.raises(PTQError, match=r"broken\.jpg' cannot be read as an image"):
        load_rgb(path)


def test_images_are_found_at_any_depth_in_order(image_folder: Path) -> None:
    files = ImageFiles(image_folder / "calib", eval_transform(HALF, HALF))
    names = [path.relative_to(image_folder / "calib").as_posix() for path in files.paths]
    assert names == [f"{i}.jpg" for i in range(6)] + [f"more/{i}.JPG" for i in range(4)]
    assert files[len(files) - 1].shape == (3, 10, 12)


def test_linked_folders_are_followed(image_folder: Path, tmp_path_factory) -> None:
    link = tmp_path_factory.mktemp("linked") / "calib"
    os.symlink(image_folder / "calib", link)
    assert len(ImageFiles(link.parent, eval_transform(HALF, HALF))) == 10


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match=f"'{re.escape(str(tmp_path))}' holds no images"):
        ImageFiles(tmp_path, eval_transform(HALF, HALF))


def test_labels_are_the_classes_in_alphabetical_order(image_folder: Path) -> None:
    data = labelled_images(image_folder / "val", eval_transform(HALF, HALF))
    assert [label for _, label in data] == [0, 0, 1, 1]


def test_a_broken_validation_image_is_named(image_folder: Path) -> None:
    (image_folder / "val" / "dog" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(PTQError, match=r"dog.1\.jpg' cannot be read"):
        labelled_images(image_folder / "val", eval_transform(HALF, HALF))[3]


def test_a_validation_folder_without_classes_is_refused(image_folder: Path) -> None:
    with pytest.raises(PTQError, match=r"more' is no folder of labelled images.*Give each class a folder"):
        labelled_images(image_folder / "calib" / "more", eval_transform(HALF, HALF))


def test_an_empty_class_is_refused_by_name(image_folder: Path) -> None:
    (image_folder / "val" / "emu").mkdir()
    with pytest.raises(PTQError, match="emu"):
        labelled_images(image_folder / "val", eval_transform(HALF, HALF))


def test_missing_cifar10_names_the_root_and_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match=r"data\.root='.*' does not hold CIFAR-10.*data\.download=true"):
        cifar10(tmp_path, train=True, mean=HALF, std=HALF)


def test_digits_are_split_once_and_for_all() -> None:
    train, val = digits(train=True).tensors, digits(train=False).tensors
    assert train[0].shape == (1000, 1, 8, 8)
    assert val[0].shape == (797, 1, 8, 8)
    assert train[0].min() == -1
    assert train[0].max() == 1
    both = torch.cat([train[0], val[0]]).flatten(1).unique(dim=0)
    everything = torch.from_numpy(sys.modules["sklearn.datasets"].load_digits().data).unique(dim=0)
    torch.testing.assert_close(both, (everything.float() / 16 - 0.5) / 0.5)
    torch.testing.assert_close(digits(train=True).tensors[1], train[1], rtol=0, atol=0)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(PTQError, match=re.escape('pip install "lightning-ptq[demo]"')):
        digits(train=True)


def test_the_shipped_teacher_is_small_and_reads_digits_it_was_not_trained_on() -> None:
    model = digits_net()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    assert WEIGHTS.stat().st_size < 200_000
    assert top1(model.eval()) >= 98


IMAGE = torch.ones(3, 4, 5)


@pytest.mark.parametrize("item", [IMAGE, (IMAGE, 1), [IMAGE, 1, "x"], {"image": IMAGE, "label": 1}])
def test_the_image_is_the_item_or_its_first_value(item: object) -> None:
    assert image_of(item, "item") is IMAGE


@pytest.mark.parametrize("item", ["text", 3, None, [], {}, ("a.jpg", IMAGE), {"label": 1, "image": IMAGE}])
def test_an_item_without_an_image_is_named(item: object) -> None:
    with pytest.raises(PTQError, match=r"Item 7 has a .* where its image should be"):
        image_of(item, "Item 7")


def test_images_are_stacked_as_float32_copies() -> None:
    batch = torch.arange(24, dtype=torch.float64).view(2, 3, 2, 2)
    stacked = stack_images((str(i), image) for i, image in enumerate(batch))
    assert stacked.dtype == torch.float32
    torch.testing.assert_close(stacked, batch.float(), rtol=0, atol=0)
    batch.zero_()
    assert stacked.sum() > 0


def test_many_images_are_stacked_in_their_order() -> None:
    images = torch.randn(101, 3, 2, 2)
    torch.testing.assert_close(stack_images((str(i), image) for i, image in enumerate(images)), images, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(3, 4, 6), "b has shape (3, 4, 6) where a has (3, 4, 5)"),
        (torch.full((3, 4, 5), float("nan")), "b holds NaN or infinite pixels"),
        (torch.full((3, 4, 5), float("inf")), "b holds NaN or infinite pixels"),
        (torch.ones(3, 4, 5, dtype=torch.uint8), "b is torch.uint8"),
        (torch.ones(4, 5), "b is torch.float32 of shape (4, 5)"),
    ],
)
def test_an_unfit_image_is_named(bad: torch.Tensor, message: str) -> None:
    with pytest.raises(PTQError, match=re.escape(message)):
        stack_images([("a", IMAGE), ("b", bad)])


def test_no_images_are_an_error() -> None:
    with pytest.raises(PTQError, match="There are no calibration images"):
        stack_images([])
