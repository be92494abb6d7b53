"""The datamodules with a data set of their own: image folders, CIFAR-10 and digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

from lightning_ptq.calibration_data import CalibrationDataModule, Shape
from lightning_ptq.datasets import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Channels,
    ImageFiles,
    Readable,
    cifar10,
    digits,
    eval_transform,
    labelled_images,
)
from lightning_ptq.errors import NoValidationImages, PTQError

__all__ = ["CIFAR10Data", "CalibrationDataModule", "DigitsData", "ImageFolderData"]


class ImageFolderData(CalibrationDataModule):
    """Image files: `root`/calib/ with any layout and no labels, `root`/val/<class>/ for validation.

    Args:
        root: folder that holds the two others.
        calibration_folder: name of the folder whose images, at any depth, are drawn from.
        validation_folder: name of the folder with one folder of images for each class, in the alphabetical order of
            the model's outputs; null for no validation.
        resize: length of the shorter side after resizing; null keeps the size.
        crop: side of the square cut from the centre; null keeps everything.
        mean: mean of each channel on [0, 1], as the model was trained with.
        std: standard deviation of each channel on [0, 1].
        calibration_samples: how many images to draw.
        val_batch_size: batch size of the validation loader.
        num_workers: worker processes that decode images.
        seed: seed of the draw; null takes seed_everything's.
        skip_bad_images: go without images that cannot be read, for calibration and validation; a warning says how many
            there were, and the summary. By default the first one is an error.

    Raises:
        PTQError: a missing or empty folder, sizes that do not fit together, or an image that cannot be read.
    """

    def __init__(
        self,
        root: str,
        calibration_folder: str = "calib",
        validation_folder: str | None = "val",
        resize: int | None = 256,
        crop: int | None = 224,
        mean: Channels = IMAGENET_MEAN,
        std: Channels = IMAGENET_STD,
        calibration_samples: int = 1024,
        val_batch_size: int = 256,
        num_workers: int = 0,
        seed: int | None = None,
        skip_bad_images: bool = False,
    ) -> None:
        super().__init__(calibration_samples, val_batch_size, num_workers, seed)
        self.skip_bad_images = skip_bad_images
        self.root = root
        self.calibration_folder = calibration_folder
        self.validation_folder = validation_folder
        self.crop = crop
        self.transform = eval_transform(mean, std, resize, crop)

    def calibration_dataset(self) -> Dataset[Any]:
        images = ImageFiles(self._folder(self.calibration_folder, "calibration"), self.transform)
        return Readable(images, images.paths) if self.skip_bad_images else images

    def validation_dataset(self) -> Dataset[Any] | None:
        if self.validation_folder is None:
            return None
        images = labelled_images(self._folder(self.validation_folder, "validation"), self.transform)
        return Readable(images, [path for path, _ in images.samples]) if self.skip_bad_images else images

    def _folder(self, name: str, role: str) -> Path:
        root, folder = Path(self.root), Path(self.root, name)
        if not root.is_dir():
            raise PTQError(f"data.root='{root}' is not a folder. Set data.root to the folder that holds '{name}'.")
        if not folder.is_dir():
            validates = role == "validation"
            off = ", or data.validation_folder=null to go without" if validates else ""
            raise (NoValidationImages if validates else PTQError)(
                f"data.root='{root}' has no folder '{name}'. "
                f"Put the {role} images below {folder} or set data.{role}_folder{off}."
            )
        return folder

    @property
    def image_shape(self) -> Shape | None:
        return super().image_shape if self.crop is None else (3, self.crop, self.crop)


class CIFAR10Data(CalibrationDataModule):
    """CIFAR-10 in its original format: calibration from the training part, validation on the test part.

    Args:
        root: folder that holds `cifar-10-batches-py`.
        download: fetch the data set into `root` if it is not there.
        mean: mean of each channel on [0, 1], as the model was trained with.
        std: standard deviation of each channel on [0, 1].
        calibration_samples: how many images to draw.
        val_batch_size: batch size of the validation loader.
        num_workers: worker processes that decode images.
        seed: seed of the draw; null takes seed_everything's.

    Raises:
        PTQError: `root` does not hold the data set.
    """

    def __init__(
        self,
        root: str,
        download: bool = False,
        mean: Channels = CIFAR10_MEAN,
        std: Channels = CIFAR10_STD,
        calibration_samples: int = 1024,
        val_batch_size: int = 256,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(calibration_samples, val_batch_size, num_workers, seed)
        self.root = root
        self.download = download
        self.mean = mean
        self.std = std

    def prepare_data(self) -> None:
        if self.download:
            CIFAR10(self.root, download=True)

    def calibration_dataset(self) -> Dataset[Any]:
        return cifar10(self.root, train=True, mean=self.mean, std=self.std)

    def validation_dataset(self) -> Dataset[Any]:
        return cifar10(self.root, train=False, mean=self.mean, std=self.std)

    @property
    def image_shape(self) -> Shape:
        return (3, 32, 32)


class DigitsData(CalibrationDataModule):
    """scikit-learn's 8x8 digits, on [-1, 1]: calibration from 1000 training images, validation on the other 797.

    Args:
        calibration_samples: how many images to draw.
        val_batch_size: batch size of the validation loader.
        num_workers: worker processes.
        seed: seed of the draw, not of the split, which is fixed; null takes seed_everything's.

    Raises:
        PTQError: scikit-learn is not installed.
    """

    def __init__(
        self,
        calibration_samples: int = 512,
        val_batch_size: int = 256,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(calibration_samples, val_batch_size, num_workers, seed)

    def calibration_dataset(self) -> Dataset[Any]:
        return digits(train=True)

    def validation_dataset(self) -> Dataset[Any]:
        return digits(train=False)

    @property
    def image_shape(self) -> Shape:
        return (1, 8, 8)
