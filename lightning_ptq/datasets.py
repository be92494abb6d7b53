"""Data sets for calibration and validation, and the checks that every calibration image passes."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from lightning_ptq.errors import PTQError

Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
CIFAR10_MEAN: Channels = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Channels = (0.2470, 0.2435, 0.2616)

DIGITS_TRAINING = 1000  # of the 1797 images of scikit-learn's load_digits
DIGITS_SPLIT_SEED = 0  # fixed: the shipped teacher has seen exactly the training part of this split


def eval_transform(
    mean: Sequence[float], std: Sequence[float], resize: int | None = None, crop: int | None = None
) -> Callable[[Image.Image], Tensor]:
    """The usual evaluation transform: PIL image to normalised float32 (C, H, W).

    Args:
        mean: mean of each channel on [0, 1].
        std: standard deviation of each channel on [0, 1].
        resize: length of the shorter side after bilinear resizing with antialiasing; None keeps the size.
        crop: side of the square cut from the centre; None keeps everything.

    Raises:
        PTQError: a size that is not positive, a crop larger than the resized image, or a mean or std that values on
            [0, 1] can't have.
    """
    for name, size in (("resize", resize), ("crop", crop)):
        if size is not None and size < 1:
            raise PTQError(f"data.{name}={size} is not a size in pixels. Use 1 or more, or null to leave it out.")
    if resize is not None and crop is not None and crop > resize:
        raise PTQError(
            f"data.crop={crop} is larger than data.resize={resize} and would pad with black. Use crop <= resize."
        )
    if not all(math.isfinite(m) for m in mean) or not all(math.isfinite(s) and s > 0 for s in std):
        raise PTQError(
            f"data.mean={tuple(mean)}, data.std={tuple(std)} cannot normalise. Use finite means and std > 0."
        )
    if not all(0 <= m <= 1 for m in mean) or any(s > 1 for s in std):
        raise PTQError(
            f"data.mean={tuple(mean)}, data.std={tuple(std)} are none of values on [0, 1], as images are read. Divide "
            "those of values up to 255 by 255."
        )
    steps: list[torch.nn.Module] = []
    if resize is not None:
        steps.append(v2.Resize(resize, interpolation=v2.InterpolationMode.BILINEAR, antialias=True))
    if crop is not None:
        steps.append(v2.CenterCrop(crop))
    steps.append(_Normalised(mean, std))
    transform: Callable[[Image.Image], Tensor] = v2.Compose(steps)
    return transform


class _Normalised(torch.nn.Module):
    """PIL image of 8 bits to normalised float32 (C, H, W): what torchvision's PILToTensor, ToDtype and Normalize give,
    bit by bit, in less than half their time, which counts with small images."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = (torch.tensor(list(values)).view(-1, 1, 1) for values in (mean, std))

    def forward(self, image: Image.Image) -> Tensor:
        x: Tensor = pil_to_tensor(image)
        return x.float().mul_(1.0 / 255.0).sub_(self.mean).div_(self.std)


def load_rgb(path: str | Path) -> Image.Image:
    """Decode the image file `path` completely, as RGB.

    Raises:
        PTQError: that fails, or would take more than `PIL.Image.MAX_IMAGE_PIXELS`; the message names the file.
    """
    try:
        with warnings.catch_warnings():
            # Up to twice as many pixels PIL only warns, and decodes them.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    except Exception as error:  # whatever a decoder raises
        raise PTQError(f"'{path}' cannot be read as an image ({error}). Replace or remove the file.") from error


class Readable(Dataset[Any]):
    """A data set of image files with None in place of the samples that cannot be read.

    Args:
        dataset: raises `PTQError` for a file that cannot be read. paths: of its samples.

    Attributes:
        unread: which samples could not be read so far, (N,) boolean, in all of a loader's processes.
    """

    def __init__(self, dataset: Dataset[Any], paths: Sequence[str | Path]) -> None:
        self.dataset, self.paths = dataset, paths
        self.unread = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except PTQError:
            self.unread[index] = True
            return None


class ImageFiles(Dataset[Tensor]):
    """The image files anywhere below `folder`, without labels, in the order of their relative paths.

    Raises:
        PTQError: the folder holds no image file; on access, a file that cannot be decoded.
    """

    def __init__(self, folder: str | Path, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform
        # os.walk and not rglob: class folders are often symbolic links, which rglob passes over.
        found = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
        self.paths = sorted((p for p in found if p.suffix.lower() in IMG_EXTENSIONS), key=Path.as_posix)
        if not self.paths:
            raise PTQError(f"'{folder}' holds no images ({', '.join(IMG_EXTENSIONS)}). Put the images there.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(load_rgb(self.paths[index]))


def labelled_images(folder: str | Path, transform: Callable[[Image.Image], Tensor]) -> ImageFolder:
    """Images of `folder`/<class>/ with the index of the class in alphabetical order as label.

    Raises:
        PTQError: no class folder, or one without images; on access, a file that cannot be decoded.
    """
    try:
        return ImageFolder(os.fspath(folder), transform=transform, loader=load_rgb)
    except FileNotFoundError as error:
        raise PTQError(
            f"'{folder}' is no folder of labelled images ({error}). Give each class a folder of its own."
        ) from error


def class_names(loader: Any) -> list[str]:
    """Names of the classes that a loader's labels count, as torchvision's data sets have them; none of others."""
    dataset = loader
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):  # as in a Subset or a Readable
        dataset = dataset.dataset
    found = getattr(dataset, "classes", None)
    names = found if isinstance(found, list | tuple) else []
    return [str(name[0] if isinstance(name, tuple) else name) for name in names]  # ImageNet's have synonyms


def cifar10(root: str | Path, *, train: bool, mean: Sequence[float], std: Sequence[float]) -> Dataset[Any]:
    """CIFAR-10 in its original format, normalised. Raises `PTQError` if `root` does not hold it."""
    try:
        images: Dataset[Any] = CIFAR10(os.fspath(root), train=train, transform=eval_transform(mean, std))
    except RuntimeError as error:
        raise PTQError(
            f"data.root='{root}' does not hold CIFAR-10 as 'cifar-10-batches-py'. "
            "Set data.download=true, or use ImageFolderData for image files."
        ) from error
    return images


def digits(*, train: bool) -> TensorDataset:
    """scikit-learn's digits: images (N, 1, 8, 8) on [-1, 1] and labels (N,); 1000 to train on, 797 to validate."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise PTQError(
            'DigitsData needs scikit-learn, which is not installed. Run pip install "lightning-ptq[demo]".'
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8) on [0, 1]
    labels = torch.from_numpy(bunch.target).long()  # (1797,)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(DIGITS_SPLIT_SEED))
    part = order[:DIGITS_TRAINING] if train else order[DIGITS_TRAINING:]
    return TensorDataset((images[part] - 0.5) / 0.5, labels[part])


def image_of(item: Any, name: str) -> Tensor:
    """The image tensor of a sample or batch: the item itself, or the first value of a tuple, list or dict.

    Raises:
        PTQError: that is not a tensor; `name` says in the message which item it was.
    """
    first = item
    if isinstance(item, Mapping):
        first = next(iter(item.values()), None)
    elif isinstance(item, Sequence) and not isinstance(item, str):
        first = item[0] if item else None
    if not isinstance(first, Tensor):
        raise PTQError(
            f"{name} has a {type(first).__name__} where its image should be. Yield a float tensor, a tuple or list "
            "that begins with one, or a dict whose first value is one."
        )
    return first


def collate(samples: list[Any]) -> Any:
    """torch's default batch of validation samples; raises `PTQError` if their images differ in shape.

    Samples that could not be read are None and left out; a batch of nothing else is None.
    """
    samples = [sample for sample in samples if sample is not None]
    if not samples:
        return None
    shapes = {tuple(image_of(sample, "A validation image").shape) for sample in samples}
    if len(shapes) > 1:
        found = ", ".join(map(str, sorted(shapes)[:3]))
        raise PTQError(
            f"validation images have different shapes ({found}). Resize and crop all to one size (data.resize, "
            "data.crop), or leave validation out (data.validation_folder=null)."
        )
    return default_collate(samples)


def stack_images(items: Iterable[tuple[str, Any]]) -> Tensor:
    """Check the images of (name, item) pairs and stack them to one float32 tensor (N, C, H, W) in host memory.

    Raises:
        PTQError: no images, or one that is not a float (C, H, W) tensor, holds NaN or infinity, or differs in shape.
    """
    images: list[Tensor] = []
    first = ""
    for name, item in items:
        image = image_of(item, name)
        if image.ndim != 3 or not image.is_floating_point():
            raise PTQError(
                f"{name} is {image.dtype} of shape {tuple(image.shape)}; calibration needs float (C, H, W), as "
                "the model reads it. Convert and normalise it in the data set's transform."
            )
        if images and image.shape != images[0].shape:
            raise PTQError(
                f"{name} has shape {tuple(image.shape)} where {first} has {tuple(images[0].shape)}; calibration stacks "
                "its images. Resize and crop all to one size (data.resize, data.crop)."
            )
        if not image.isfinite().all():
            raise PTQError(f"{name} holds NaN or infinite pixels. Remove it or correct the transform that made them.")
        first = first or name
        images.append(image.detach().to("cpu", torch.float32, copy=True))  # copied: a view keeps its whole batch alive
    if not images:
        raise PTQError("There are no calibration images. Give at least one for each rank, better several hundred.")
    return torch.stack(images)
