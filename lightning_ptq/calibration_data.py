"""Where calibration images come from: the base of every datamodule here, and the user's own loaders."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_ptq.cache import Minibatch
from lightning_ptq.datasets import ImageFiles, Readable, collate, image_of, stack_images
from lightning_ptq.errors import PTQError

Shape = tuple[int, int, int]
# What users leave it at who give a loader: then it only says where to stop.
_SAMPLES = 1024
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class CalibrationDataModule(L.LightningDataModule):
    """Gives a `PTQModule` its calibration images and the Trainer its validation loaders.

    A subclass implements `calibration_dataset` and `validation_dataset`, whose samples are float images (C, H, W) as
    the model reads them, alone or first in a tuple, list or dict. `from_loaders` and `wrap` need no subclass.

    Args:
        calibration_samples: how many images to draw from the calibration data set.
        val_batch_size: batch size of the validation loader.
        num_workers: worker processes that decode images; 0 decodes in the main process.
        seed: seed of the draw; None takes that of `lightning.seed_everything`, or else 0.

    Attributes:
        images_available: how many images the draw had to choose from; None before it, or if a loader was not read to
            its end.

    Raises:
        PTQError: a number outside its range.
    """

    images_available: int | None = None

    def __init__(
        self,
        calibration_samples: int = _SAMPLES,
        val_batch_size: int = 256,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("calibration_samples", calibration_samples, 1),
            ("val_batch_size", val_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise PTQError(f"data.{name}={value} is too small. Use {least} or more.")
        self.calibration_samples = calibration_samples
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.seed = seed

    @staticmethod
    def from_loaders(
        calib_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        calibration_samples: int = _SAMPLES,
        seed: int | None = None,
    ) -> CalibrationDataModule:
        """Calibrate on the first `calibration_samples` images of a loader.

        Args:
            calib_loader: anything that yields image batches (N, C, H, W), alone or first in a tuple, list or dict.
            val_loader: validation loader, used as it is; None for no validation.
            calibration_samples: how many images to take.
            seed: of torch's generator while `calib_loader` is read, so that a shuffling loader gives the same images.
        """
        return _LoaderData(calib_loader, val_loader, calibration_samples, seed)

    @staticmethod
    def wrap(
        datamodule: L.LightningDataModule, calibration_samples: int = _SAMPLES, seed: int | None = None
    ) -> CalibrationDataModule:
        """Calibrate on a LightningDataModule's `train_dataloader` and validate on its `val_dataloader`.

        Raises:
            PTQError: no datamodule, or one that changes batches in transfer hooks, which calibration would not see.
        """
        if not isinstance(datamodule, L.LightningDataModule):
            raise PTQError(
                f"wrap takes a LightningDataModule, and got {type(datamodule).__name__}. Give loaders to from_loaders."
            )
        return _WrappedData(datamodule, calibration_samples, seed)

    def calibration_dataset(self) -> Dataset[Any]:
        """The data set to draw calibration images from; labels, if any, are not read."""
        raise NotImplementedError(f"{type(self).__name__} must implement calibration_dataset().")

    def validation_dataset(self) -> Dataset[Any] | None:
        """The data set of (image, label) samples to validate on, or None."""
        raise NotImplementedError(f"{type(self).__name__} must implement validation_dataset().")

    @cached_property
    def _calibration(self) -> Dataset[Any]:
        dataset = self.calibration_dataset()
        if not isinstance(dataset, Sized):
            raise PTQError(
                f"calibration_dataset() returns a {type(dataset).__name__} without a length; the draw needs one. "
                "Use CalibrationDataModule.from_loaders for a stream of images."
            )
        if len(dataset) == 0:
            raise PTQError(
                f"calibration_dataset() returns a {type(dataset).__name__} without images. Give at least one."
            )
        return dataset

    @cached_property
    def _validation(self) -> Dataset[Any] | None:
        return self.validation_dataset()

    def setup(self, stage: str) -> None:
        """Build the data sets of `stage`, so that a missing folder is reported before any work is done."""
        if stage == "fit":
            _ = self._calibration
        _ = self._validation

    @property
    def image_shape(self) -> Shape | None:
        """Shape (C, H, W) of an image, read from the first one unless the transforms determine it; None if unknown."""
        with _seeded(self.draw_seed):
            images = (self._calibration[i] for i in range(len(cast(Sized, self._calibration))))
            return next((_shape(image_of(image, "calibration image 0")) for image in images if image is not None), None)

    @property
    def calibration_count(self) -> int:
        """How many images will be drawn, as far as that can be told before they are read."""
        return self.count_with(0.0)

    def count_with(self, further: float) -> int:
        """The same with so many more images, as a share of `calibration_samples`."""
        return min(self._wanted(further), len(cast(Sized, self._calibration)))

    def _wanted(self, further: float) -> int:
        return self.calibration_samples + int(self.calibration_samples * further)

    @property
    def draw_seed(self) -> int:
        """The seed that the draw of calibration images uses."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def calibration_images(self, rank: int = 0, world_size: int = 1, further: float = 0.0) -> Tensor:
        """Draw this rank's calibration images: float32 (n, C, H, W) in host memory.

        The draw is without replacement and depends only on the seed and the data set's order. Rank r takes every
        `world_size`-th image from the r-th on, so all ranks together hold the same images whatever their number.

        Args:
            further: so many more images, as a share of `calibration_samples`, where there are so many; behind the
                others, which are the same without them.

        Warns:
            UserWarning: there are fewer images than `calibration_samples`; all are used.

        Raises:
            PTQError: no images, one that cannot be read, or images that are not finite or differ in shape.
        """
        with _seeded(self.draw_seed):
            images = stack_images(self._draw(rank, world_size, self._wanted(further)))
        self._warn_of_unread(vars(self).get("_calibration"), "calibration")
        return images

    @property
    def unread_images(self) -> tuple[int, int]:
        """How many images of calibration and of validation this process could not read, and skipped, so far."""
        calibration, validation = (vars(self).get(name) for name in ("_calibration", "_validation"))
        return _unread(calibration), _unread(validation)

    def teardown(self, stage: str) -> None:
        """Say how many validation images were skipped."""
        self._warn_of_unread(vars(self).get("_validation"), "validation")

    @staticmethod
    def _warn_of_unread(dataset: Dataset[Any] | None, role: str) -> None:
        if count := _unread(dataset):
            assert isinstance(dataset, Readable)
            first = dataset.paths[int(dataset.unread.int().argmax())]
            warnings.warn(
                f"{count} {role} image{'s' * (count > 1)} cannot be read and {'are' if count > 1 else 'is'} skipped "
                f"(data.skip_bad_images); the first is '{first}'.",
                stacklevel=2,
            )

    def _draw(self, rank: int, world_size: int, count: int) -> Iterator[tuple[str, Any]]:
        """Yield (name, sample) for every image that `rank` draws, `count` over all ranks if there are so many."""
        dataset = self._calibration
        size = len(cast(Sized, dataset))  # `_calibration` has checked it
        self._count(size, warn=rank == 0)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(self.draw_seed))
        drawn = order[:count][rank::world_size].tolist()
        samples = DataLoader(Subset(dataset, drawn), batch_size=None, num_workers=self.num_workers)
        for index, sample in zip(drawn, samples, strict=True):
            file = f"'{dataset.paths[index]}'" if isinstance(dataset, ImageFiles | Readable) else ""
            if sample is not None or not isinstance(dataset, Readable):
                yield file or f"Calibration image {index}", sample

    def _count(self, size: int, warn: bool) -> None:
        """Keep how many images there are, and `warn` where they are too few."""
        self.images_available = size
        if warn and 0 < size < self.calibration_samples:
            warnings.warn(
                f"data.calibration_samples={self.calibration_samples}, but there {'is' if size == 1 else 'are'} only "
                f"{size} calibration image{'s' * (size > 1)}. "
                "All are used; more images or a smaller number silence this.",
                stacklevel=2,
            )

    def train_dataloader(self) -> Any:
        """The module's unit loader: a datamodule replaces the module's own loaders, so it has to hand it on."""
        if self.trainer is None:
            raise PTQError("The unit loader exists only in a Trainer. Call Trainer.fit(module, datamodule=data).")
        module: Any = self.trainer.lightning_module
        if not hasattr(module, "unit_loader"):
            raise PTQError(
                f"{type(module).__name__} has no unit_loader(): calibration data feed a PTQModule. "
                "Fit PTQModule(model, ...) instead of the model itself."
            )
        return module.unit_loader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Images for validation are moved; a minibatch of caches is where it has to be."""
        if isinstance(batch, Minibatch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def val_dataloader(self) -> Any:
        """Loader of the validation data set, in its order; an empty list if there is none."""
        if self._validation is None:
            return []
        kind = ReadableLoader if isinstance(self._validation, Readable) else DataLoader
        return kind(
            self._validation,
            batch_size=self.val_batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
        )

    def test_dataloader(self) -> Any:
        """The same as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """The same as `val_dataloader`."""
        return self.val_dataloader()


class ReadableLoader(DataLoader[Any]):
    """A loader that passes over batches of which no sample could be read."""

    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__() if batch is not None)


def _unread(dataset: Dataset[Any] | None) -> int:
    return int(dataset.unread.sum()) if isinstance(dataset, Readable) else 0


class _LoaderData(CalibrationDataModule):
    """What `CalibrationDataModule.from_loaders` makes."""

    def __init__(
        self, calib_loader: Iterable[Any], val_loader: Iterable[Any] | None, calibration_samples: int, seed: int | None
    ) -> None:
        super().__init__(calibration_samples, seed=seed)
        self._calib_loader = calib_loader
        self._val_loader = val_loader

    def calibration_loader(self) -> Iterable[Any]:
        return self._calib_loader

    def setup(self, stage: str) -> None:
        """Nothing to build."""

    def count_with(self, further: float) -> int:
        return self._wanted(further)

    @property
    def image_shape(self) -> Shape | None:
        loader = self.calibration_loader()
        if isinstance(loader, Iterator):  # looking at its first batch would take that batch from the calibration
            return None
        with _seeded(self.draw_seed):
            for batch in loader:
                return _shape(_batch_of_images(batch, 0)[0])
        raise PTQError("The calibration loader yields nothing. Give a loader with at least one image.")

    def _draw(self, rank: int, world_size: int, count: int) -> Iterator[tuple[str, Any]]:
        seen = 0
        for number, batch in enumerate(self.calibration_loader()):
            for image in _batch_of_images(batch, number):
                if seen % world_size == rank:
                    yield f"Calibration image {seen}", image
                seen += 1
                if seen == count:
                    return
        self._count(seen, warn=rank == 0 and self.calibration_samples != _SAMPLES)

    def val_dataloader(self) -> Any:
        return [] if self._val_loader is None else self._val_loader


class _WrappedData(_LoaderData):
    """What `CalibrationDataModule.wrap` makes."""

    def __init__(self, datamodule: L.LightningDataModule, calibration_samples: int, seed: int | None) -> None:
        super().__init__((), None, calibration_samples, seed)
        changed = [hook for hook in TRANSFER_HOOKS if is_overridden(hook, datamodule)]
        if changed:
            raise PTQError(
                f"{type(datamodule).__name__} overrides {', '.join(changed)}, which calibration images do not pass. "
                "Do that work in the data set's transform, or give finished batches to from_loaders."
            )
        self.datamodule = datamodule
        self.prepare_data_per_node = datamodule.prepare_data_per_node
        self._prepared = False
        self._stages: set[str] = set()

    def prepare_data(self) -> None:
        self.datamodule.prepare_data()
        self._prepared = True

    def setup(self, stage: str) -> None:
        self.datamodule.trainer = self.trainer
        self.datamodule.setup(stage)
        self._stages.add(stage)

    def teardown(self, stage: str) -> None:
        self.datamodule.teardown(stage)
        self._stages.discard(stage)

    def calibration_loader(self) -> Iterable[Any]:
        self._ensure("fit")
        loader: Iterable[Any] = self.datamodule.train_dataloader()
        return loader

    def val_dataloader(self) -> Any:
        if not is_overridden("val_dataloader", self.datamodule):
            return []
        self._ensure("validate")
        return self.datamodule.val_dataloader()

    def test_dataloader(self) -> Any:
        return self._own_or_validation("test_dataloader", "test")

    def predict_dataloader(self) -> Any:
        return self._own_or_validation("predict_dataloader", "predict")

    def _own_or_validation(self, loader: str, stage: str) -> Any:
        if not is_overridden(loader, self.datamodule):
            return self.val_dataloader()
        self._ensure(stage)
        return getattr(self.datamodule, loader)()

    def _ensure(self, stage: str) -> None:
        """Set up for `stage` where no Trainer has done it: outside one, or when it runs another stage."""
        if stage in self._stages or (stage == "validate" and "fit" in self._stages):
            return
        if self.trainer is None and not self._prepared:
            self.prepare_data()
        self.setup(stage)


def _batch_of_images(batch: Any, number: int) -> Tensor:
    """The images (N, C, H, W) of a loader's batch."""
    images = image_of(batch, f"Batch {number} of the calibration loader")
    if images.ndim != 4:
        raise PTQError(
            f"Batch {number} of the calibration loader has shape {tuple(images.shape)}; calibration needs "
            "(N, C, H, W). Give a loader that yields batches of images."
        )
    return images


def _shape(image: Tensor) -> Shape:
    channels, height, width = image.shape
    return channels, height, width


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, for the loaders and transforms that draw from it, and put its state back after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
