from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_ptq.datamodule import CalibrationDataModule, CIFAR10Data, DigitsData, ImageFolderData
from lightning_ptq.datasets import class_names
from lightning_ptq.errors import PTQError


def numbered(count: int) -> Tensor:
    """Images (N, 1, 2, 2) that hold their own index."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def indices(images: Tensor) -> list[int]:
    return images[:, 0, 0, 0].int().tolist()


class Numbered(CalibrationDataModule):
    def __init__(self, count: int, **options: Any) -> None:
        super().__init__(**options)
        self.count = count

    def calibration_dataset(self) -> Dataset[Any]:
        return TensorDataset(numbered(self.count), torch.zeros(self.count))

    def validation_dataset(self) -> Dataset[Any] | None:
        return None


class Plain(L.LightningModule):
    """An ordinary module that notes which of its steps ran."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)
        self.seen: list[str] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append("training")
        return self.net(batch.flatten(1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append("validation")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class UnitStub(Plain):
    """As much of a PTQModule as its datamodule sees: a unit loader of two steps."""

    def unit_loader(self) -> Any:
        self.seen.append("unit_loader")
        return DataLoader(torch.ones(6, 1, 8, 8), batch_size=3)


def trainer() -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# The draw


def test_the_draw_is_without_replacement_and_repeats() -> None:
    drawn = indices(Numbered(50, calibration_samples=20).calibration_images())
    assert len(set(drawn)) == 20
    assert drawn != sorted(drawn)
    assert drawn == indices(Numbered(50, calibration_samples=20).calibration_images())


def test_a_smaller_draw_begins_a_larger_one() -> None:
    few, many = (indices(Numbered(50, calibration_samples=n).calibration_images()) for n in (8, 32))
    assert few == many[:8]


@pytest.mark.parametrize("world_size", [1, 3])
def test_further_images_come_behind_the_others(world_size: int) -> None:
    loader = CalibrationDataModule.from_loaders(
        [torch.rand(8, 3, 4, 4), torch.rand(5, 3, 4, 4)], calibration_samples=10
    )
    many, few = (Numbered(count, calibration_samples=10) for count in (13, 11))
    for data, further in ((many, 3), (few, 1), (loader, 3)):
        for rank in range(world_size):
            alone, both = (data.calibration_images(rank, world_size, share) for share in (0.0, 0.3))
            assert torch.equal(both[: len(alone)], alone)
            assert len(both) == len(range(rank, 10 + further, world_size))
    assert [few.count_with(share) for share in (0.0, 0.3)] == [10, 11]


def test_the_seed_decides_the_draw_and_seed_everything_gives_it() -> None:
    def draw(seed: int | None) -> list[int]:
        return indices(Numbered(50, calibration_samples=20, seed=seed).calibration_images())

    assert draw(None) == draw(0)
    assert draw(1) != draw(0)
    L.seed_everything(1)
    assert draw(None) == draw(1)
    assert draw(2) != draw(1)


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_ranks_partition_the_draw_whatever_their_number(world_size: int) -> None:
    data = Numbered(50, calibration_samples=20)
    ranks = [indices(data.calibration_images(rank, world_size)) for rank in range(world_size)]
    assert sorted(index for rank in ranks for index in rank) == sorted(indices(data.calibration_images()))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Numbered(5, calibration_samples=2).calibration_images()
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)


def test_too_few_images_warn_and_are_all_used() -> None:
    with pytest.warns(UserWarning, match=r"data\.calibration_samples=9, but there are only 4 calibration images"):
        images = Numbered(4, calibration_samples=9).calibration_images()
    assert sorted(indices(images)) == [0, 1, 2, 3]
    assert len(Numbered(4, calibration_samples=9).calibration_images(1, 2)) == 2, "the first process has said it"
    assert [Numbered(4, calibration_samples=n).calibration_count for n in (3, 9)] == [3, 4]


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(PTQError, match="TensorDataset without images"):
        Numbered(0).calibration_images()


def test_a_rank_without_an_image_is_refused() -> None:
    with pytest.raises(PTQError, match="at least one for each rank"):
        Numbered(50, calibration_samples=2).calibration_images(rank=2, world_size=3)


def test_a_data_set_without_a_length_is_sent_to_from_loaders() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(numbered(3))

    class Streamed(Numbered):
        def calibration_dataset(self) -> Dataset[Any]:
            return Stream()

    with pytest.raises(PTQError, match=r"Stream without a length.*from_loaders"):
        Streamed(3).calibration_images()


@pytest.mark.parametrize("option", [{"calibration_samples": 0}, {"val_batch_size": 0}, {"num_workers": -1}])
def test_a_number_outside_its_range_is_refused(option: dict[str, int]) -> None:
    name, value = next(iter(option.items()))
    with pytest.raises(PTQError, match=rf"data\.{name}={value} is too small"):
        Numbered(3, **option)


# Image folders


def folder_data(root: Path, **options: Any) -> ImageFolderData:
    return ImageFolderData(str(root), **{"resize": None, "crop": None, "calibration_samples": 10, **options})


def test_an_image_folder_gives_calibration_images_and_labelled_batches(image_folder: Path) -> None:
    data = folder_data(image_folder, resize=9, crop=8, val_batch_size=3)
    assert data.image_shape == (3, 8, 8)
    assert data.calibration_images().shape == (10, 3, 8, 8)
    assert data.images_available == 10
    batches = list(data.val_dataloader())
    assert [images.shape[0] for images, _ in batches] == [3, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("skip_bad_images", [False, True])
def test_class_folders_name_the_classes(image_folder: Path, skip_bad_images: bool) -> None:
    data = folder_data(image_folder, skip_bad_images=skip_bad_images)
    assert class_names(data.val_dataloader()) == ["cat", "dog"]
    assert class_names(DataLoader(numbered(3))) == class_names([]) == []


def test_workers_decode_the_same_images(image_folder: Path) -> None:
    alone, helped = (folder_data(image_folder, num_workers=n).calibration_images() for n in (0, 1))
    torch.testing.assert_close(alone, helped, rtol=0, atol=0)


def test_the_shape_is_known_without_the_disk_where_a_crop_fixes_it() -> None:
    assert ImageFolderData("nowhere").image_shape == (3, 224, 224)


def test_the_shape_comes_from_the_first_image_otherwise(image_folder: Path) -> None:
    assert folder_data(image_folder).image_shape == (3, 10, 12)


def test_setup_reports_a_missing_root(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match=r"data\.root='.*gone' is not a folder\..*holds 'calib'"):
        folder_data(tmp_path / "gone").setup("fit")


def test_setup_reports_a_missing_calibration_folder(image_folder: Path) -> None:
    data = folder_data(image_folder, calibration_folder="kalib")
    data.setup("validate")  # validation does not need it
    with pytest.raises(PTQError, match=r"has no folder 'kalib'\. .*set data\.calibration_folder"):
        data.setup("fit")


def test_setup_reports_a_missing_validation_folder(image_folder: Path) -> None:
    with pytest.raises(PTQError, match=r"has no folder 'test'\. .*data\.validation_folder=null"):
        folder_data(image_folder, validation_folder="test").setup("fit")


def test_setup_reports_an_empty_folder(image_folder: Path) -> None:
    (image_folder / "void").mkdir()
    with pytest.raises(PTQError, match="void' holds no images"):
        folder_data(image_folder, calibration_folder="void").setup("fit")


def test_no_validation_folder_means_no_loaders(image_folder: Path) -> None:
    data = folder_data(image_folder, validation_folder=None)
    data.setup("fit")
    assert [data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()] == [[], [], []]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_calibration_image_is_named(image_folder: Path, num_workers: int) -> None:
    (image_folder / "calib" / "more" / "2.JPG").write_bytes(b"no image")
    with pytest.raises(PTQError, match=r"more.2\.JPG' cannot be read"):
        folder_data(image_folder, num_workers=num_workers).calibration_images()


def test_images_of_differing_shapes_are_named(image_folder: Path, write_image: Any) -> None:
    write_image(image_folder / "calib" / "odd.jpg", size=(11, 10))
    with pytest.raises(
        PTQError, match=r"\.(jpg|JPG)' has shape \(3, 10, 1\d\) where '.*' has \(3, 10, 1\d\)"
    ) as caught:
        folder_data(image_folder, calibration_samples=11).calibration_images()
    assert "odd.jpg" in str(caught.value)


def test_validation_images_of_differing_shapes_are_refused(image_folder: Path, write_image: Any) -> None:
    first = sorted(path for path in (image_folder / "val").rglob("*") if path.is_file())[0]
    write_image(first.with_name("0odd.jpg"), size=(11, 17))
    loader = folder_data(image_folder).val_dataloader()
    with pytest.raises(PTQError, match=r"validation images have different shapes \(.*data\.resize"):
        list(loader)


def test_pixels_that_are_not_finite_are_named_by_index() -> None:
    class Broken(Numbered):
        def calibration_dataset(self) -> Dataset[Any]:
            images = numbered(5).clone()
            images[3, 0, 1, 1] = float("nan")
            return TensorDataset(images)

    with pytest.raises(PTQError, match="Calibration image 3 holds NaN"):
        Broken(5, calibration_samples=5).calibration_images()


def test_real_images_are_drawn(cifar_root: Path) -> None:
    data = ImageFolderData(str(cifar_root), resize=None, crop=None, calibration_samples=64)
    images = data.calibration_images()
    assert images.shape == (64, 3, 32, 32)
    assert 0.5 < images.std() < 2  # normalised


# CIFAR-10 and digits


@pytest.fixture
def cifar10_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The original format, ten images a file; torchvision's checksums are told to agree."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        content = {"data": torch.full((10, 3072), number * 10, dtype=torch.uint8).numpy(), "labels": [number] * 10}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return tmp_path


def test_cifar10_calibrates_on_training_and_validates_on_test_images(cifar10_root: Path) -> None:
    data = CIFAR10Data(str(cifar10_root), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), calibration_samples=50)
    data.prepare_data()
    data.setup("fit")
    assert data.image_shape == (3, 32, 32)
    levels = (data.calibration_images().amax(dim=(1, 2, 3)) * 255).round().int().tolist()
    assert sorted(levels) == sorted([0, 10, 20, 30, 40] * 10)
    images, labels = next(iter(data.val_dataloader()))
    assert labels.tolist() == [5] * 10
    torch.testing.assert_close(images, torch.full((10, 3, 32, 32), 50 / 255))


def test_missing_cifar10_is_reported_in_setup(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match="does not hold CIFAR-10"):
        CIFAR10Data(str(tmp_path)).setup("fit")


def test_digits_are_ready_made() -> None:
    data = DigitsData()
    assert data.calibration_images().shape == (512, *data.image_shape)
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 797


# The user's own loaders


@pytest.mark.parametrize(
    "make",
    [
        lambda images: DataLoader(images, batch_size=4),
        lambda images: DataLoader(TensorDataset(images, torch.zeros(10)), batch_size=4),
        lambda images: [{"image": batch, "id": "x"} for batch in images.split(4)],
        lambda images: iter(images.split(4)),
    ],
    ids=["tensors", "pairs", "dicts", "iterator"],
)
def test_the_first_images_of_a_loader_are_taken(make: Any) -> None:
    data = CalibrationDataModule.from_loaders(make(numbered(10)), calibration_samples=6)
    assert data.image_shape in ((1, 2, 2), None)
    assert indices(data.calibration_images()) == [0, 1, 2, 3, 4, 5]
    assert data.images_available is None, "not read to its end"
    assert data.val_dataloader() == []


def test_ranks_partition_a_loaders_images() -> None:
    data = CalibrationDataModule.from_loaders(DataLoader(numbered(10), batch_size=4), calibration_samples=9)
    assert [indices(data.calibration_images(rank, 2)) for rank in range(2)] == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]


def test_a_shuffling_loader_gives_the_same_images_each_time() -> None:
    data = CalibrationDataModule.from_loaders(DataLoader(numbered(50), batch_size=4, shuffle=True), seed=5)
    first, second = data.calibration_images(), data.calibration_images()
    assert indices(first) == indices(second) != list(range(50))
    assert data.images_available == 50


def test_a_loader_that_ends_early_is_news_only_where_a_number_was_asked_for() -> None:
    assert len(CalibrationDataModule.from_loaders([numbered(10)]).calibration_images()) == 10  # warnings are errors
    asked = CalibrationDataModule.from_loaders([numbered(10)], calibration_samples=11)
    with pytest.warns(UserWarning, match=r"calibration_samples=11, but there are only 10"):
        asked.calibration_images()


def test_the_validation_loader_is_used_as_it_is() -> None:
    loader = DataLoader(numbered(3))
    data = CalibrationDataModule.from_loaders([], loader)
    assert data.val_dataloader() is data.test_dataloader() is data.predict_dataloader() is loader


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "no calibration images"),
        ([numbered(2)[0]], "Batch 0 of the calibration loader has shape (1, 2, 2)"),
        ([numbered(2), "text"], "Batch 1 of the calibration loader has a str"),
        ([numbered(2), torch.full((1, 1, 2, 2), float("nan"))], "Calibration image 2 holds NaN"),
    ],
)
def test_an_unfit_loader_is_refused(loader: list[Any], message: str) -> None:
    with pytest.raises(PTQError, match=re.escape(message)):
        CalibrationDataModule.from_loaders(loader).calibration_images()


def test_an_empty_loader_has_no_shape() -> None:
    with pytest.raises(PTQError, match="calibration loader yields nothing"):
        _ = CalibrationDataModule.from_loaders([]).image_shape


class UserData(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)
        if stage in ("fit", "validate"):
            self.val = numbered(3)
        if stage == "fit":
            self.train = numbered(10)

    def teardown(self, stage: str) -> None:
        self.calls.append("teardown")

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val)


class UserTestData(UserData):
    def test_dataloader(self) -> Any:
        return DataLoader(numbered(5))


def test_a_wrapped_datamodule_is_set_up_once_outside_a_trainer() -> None:
    inner = UserData()
    data = CalibrationDataModule.wrap(inner, calibration_samples=4)
    assert data.image_shape == (1, 2, 2)
    assert indices(data.calibration_images()) == [0, 1, 2, 3]
    assert len(data.val_dataloader()) == 3
    assert inner.calls == ["prepare", "fit"]


def test_a_wrapped_datamodule_lives_in_the_trainer() -> None:
    inner, module = UserData(), UnitStub()
    trainer().fit(module, datamodule=CalibrationDataModule.wrap(inner))
    assert inner.calls == ["prepare", "fit", "teardown"]
    assert inner.trainer is module.trainer
    assert module.seen.count("validation") == 2 + 3  # sanity check and epoch


@pytest.mark.parametrize(("inner", "batches"), [(UserData(), 3), (UserTestData(), 5)])
def test_a_wrapped_datamodule_tests_on_its_own_loader_or_on_validation(inner: UserData, batches: int) -> None:
    module = UnitStub()
    trainer().test(module, datamodule=CalibrationDataModule.wrap(inner), verbose=False)
    assert module.seen.count("test") == batches


def test_a_wrapped_datamodule_needs_no_validation() -> None:
    class TrainOnly(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(numbered(4))

    data = CalibrationDataModule.wrap(TrainOnly())
    assert data.val_dataloader() == data.test_dataloader() == []


def test_a_datamodule_that_changes_batches_on_the_way_is_refused() -> None:
    class Normalising(UserData):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch / 255

    with pytest.raises(PTQError, match="Normalising overrides on_after_batch_transfer"):
        CalibrationDataModule.wrap(Normalising())


# In a Trainer


def test_fit_takes_the_modules_unit_loader_and_the_validation_loader() -> None:
    module = UnitStub()
    trainer().fit(module, datamodule=DigitsData(val_batch_size=797))
    assert module.seen == ["validation", "unit_loader", "training", "training", "validation"]


def test_a_module_without_units_is_refused() -> None:
    with pytest.raises(PTQError, match=r"Plain has no unit_loader\(\).*PTQModule"):
        trainer().fit(Plain(), datamodule=DigitsData())


def test_the_unit_loader_needs_a_trainer() -> None:
    with pytest.raises(PTQError, match=r"Call Trainer\.fit"):
        DigitsData().train_dataloader()
