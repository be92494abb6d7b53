"""What several test modules share; everything here is cheap."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_ptq import PTQModule, kernels

torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for one another

WriteImage = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork come first: after torch.export or fake tensors and a backward pass, autograd refuses a fork.

    Of several workers the first one begins with them, since each is given a part of the list and takes from the end of
    another's (`--dist=worksteal`).
    """
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)


def pytest_collection_finish() -> None:
    """What imports made stays: the garbage collector need not look through it again and again, nor as often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(scope="module", params=["kernels", "operations"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that use it run with the compiled kernels and with torch's operations in their place."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "operations":
            patch.setattr(kernels, "cpu_kernels", lambda: None)
        elif kernels.cpu_kernels() is None:
            pytest.skip("needs a C compiler with OpenMP")
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_report() -> Iterator[None]:
    """Fits here draw no report unless they ask for it: it would take longer than most of them."""
    defaults = PTQModule.__init__.__kwdefaults__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(defaults, "report", False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_fsync() -> Iterator[None]:
    """No test needs its files after a power cut, and waiting for the disk takes a fifth of a short fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True)
def _no_global_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`seed_everything` leaves its seed in the environment, where the next test's draw would find it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture
def write_image() -> WriteImage:
    """A function that writes one small JPEG of random pixels and gives back its path."""

    def write(path: Path, size: tuple[int, int] = (12, 10), seed: int = 0) -> Path:
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
        return path

    return write


@pytest.fixture
def image_folder(tmp_path: Path, write_image: WriteImage) -> Path:
    """A root with calib/ (10 images, flat and in a subfolder) and val/ (classes cat and dog, 2 images each)."""
    names = [f"calib/{i}.jpg" for i in range(6)] + [f"calib/more/{i}.JPG" for i in range(4)]
    names += [f"val/{label}/{i}.jpg" for label in ("cat", "dog") for i in range(2)]
    for seed, name in enumerate(names):
        write_image(tmp_path / name, seed=seed)
    (tmp_path / "calib" / "notes.txt").write_text("not an image")
    return tmp_path


@pytest.fixture(scope="session")
def cifar_root() -> Path:
    """Folder of real images and trained weights (calib/, val/, teachers/), where the environment names one."""
    root = os.environ.get("LIGHTNING_PTQ_CIFAR10")
    if not root:
        pytest.skip("LIGHTNING_PTQ_CIFAR10 names no folder of real images")
    return Path(root)
