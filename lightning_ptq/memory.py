"""How much memory the caches of a calibration take, from shapes alone, and where there is room for them."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lightning_ptq.errors import DEVICE_ERRORS, PTQError
from lightning_ptq.graph.export import unlogged
from lightning_ptq.graph.units import Chain
from lightning_ptq.store import CacheType, Tier, readable

CachePolicy = Literal["auto", "device", "host", "disk"]

_PREFIXES = " KMGT"
# Control groups, which containers are: limit and use, version 2 and 1.
_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
# What a module kept in floating point may do that shapes alone do not answer.
_LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


def bytes_of(budget: int | str | None) -> int | None:
    """`memory_budget` in bytes: a number of them, or one with a unit, "8GB" (10^9) or "8GiB" (2^30).

    Raises:
        PTQError: neither, or nothing.
    """
    if budget is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kKMGT])(i?)B|B)?", str(budget), re.ASCII)
    size = (
        int(float(match[1]) * (1024 if match[3] else 1000) ** _PREFIXES.index((match[2] or " ").upper()))
        if match
        else 0
    )
    if size <= 0:
        raise PTQError(f"memory_budget={budget!r} is no size. Give bytes, or a number with a unit: '8GB' or '7.5GiB'.")
    return size


def unit_shapes(chain: Chain, image_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shape of one image (C, H, W) and of every unit's output for it.

    From shapes alone, unless a module that was kept whole looks at values: then from one black image.

    Raises:
        PTQError: images of this shape do not fit a unit, which is named.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), unlogged():
            return _shapes(chain, image_shape)
    except _LOOKS_AT_VALUES:
        return _shapes(chain, image_shape)


@torch.no_grad()
def _shapes(chain: Chain, image_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    shapes = [tuple(image_shape)]
    x = torch.zeros(1, *image_shape, device=next(chain.parameters()).device)
    chain.check_images(x)
    for name, unit in zip(chain.names, chain.units, strict=True):
        try:
            x = unit(x)
        except (*_LOOKS_AT_VALUES, *DEVICE_ERRORS):
            raise
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = str(error).rstrip(".")
            if next(chain.parameters()).dtype == torch.float64:
                raise PTQError(
                    f"the model is in float64, and unit {name!r} fails on float32: {reason}. Call model.float() first."
                ) from None
            raise PTQError(
                f"images of shape {tuple(image_shape)} do not fit the model: unit {name!r} fails on its input "
                f"{shapes[-1]}: {reason}. Give images of the size (data.resize, data.crop) and with the channels "
                "that the model was trained on."
            ) from None
        shapes.append(tuple(x.shape[1:]))
    return shapes


@dataclass(frozen=True)
class CacheSizes:
    """Bytes of the caches, all images together.

    Attributes:
        units: while a unit's steps run: both networks' inputs, which of the first unit are the images, the teacher's
            output and its final one. network: the same of the last epoch.
        most: the most there ever is: the output that becomes the next unit's input comes to it, and the images, which
            are kept. where: the unit at which that is.
    """

    units: tuple[int, ...]
    network: int
    most: int
    where: str

    @classmethod
    def of(
        cls, chain: Chain, shapes: Sequence[tuple[int, ...]], samples: int, dtype: CacheType, corrected: bool = False
    ) -> CacheSizes:
        """Of a network with these `unit_shapes`; `corrected`: PD-Quant's distribution correction runs."""
        width, last = 2 if dtype == "bfloat16" else 4, len(shapes) - 1
        # Images and final outputs are never rounded.
        sizes = [samples * (width if 0 < k < last else 4) * math.prod(shape) for k, shape in enumerate(shapes)]
        # Of a part, means over positions are kept in place of the output.
        final = samples * 4 * (shapes[-1][0] if chain.is_part else math.prod(shapes[-1]))
        units = tuple((1 if k == 0 else 2) * sizes[k] + sizes[k + 1] + final for k in range(last))
        most = [
            units[k] + sizes[k + 1] + (sizes[0] if k else 0) + corrected * (sizes[k] + sizes[k + 1])
            for k in range(last)
        ]
        k = most.index(max(most))
        return cls(units, sizes[0] + sizes[-2] + final, most[k], chain.names[k])


@dataclass(frozen=True)
class Room:
    """What there is for caches, in bytes.

    Attributes:
        device: where units run. processes: so many may share the machine.
        budget: what the user grants each of them in memory; None: half of what is free.
        folder: for files.
    """

    device: torch.device
    budget: int | None
    folder: Path
    processes: int = 1

    def choose(self, policy: CachePolicy, sizes: CacheSizes) -> Tier:
        """The first tier that has room, or the one that the policy names.

        Raises:
            PTQError: the named tier, or the disk as the last one, has no room.
        """
        if policy in ("device", "host"):
            if self.budget is not None and sizes.most > self.budget:
                raise PTQError(
                    f"cache={policy!r} needs {readable(sizes.most)} (unit {sizes.where!r}), more than memory_budget="
                    f"{readable(self.budget)}. Raise the budget, or leave `cache` to 'auto' or 'disk'."
                )
            return "host" if policy == "host" else "device"
        if policy == "auto" and self.device.type == "cuda" and sizes.most <= self._allowed(self._free_on_device()):
            return "device"
        if policy == "auto" and sizes.most <= self._allowed(free_memory() // self.processes):
            return "host"
        free = shutil.disk_usage(_existing(self.folder)).free
        if sizes.most > free:
            raise PTQError(
                f"caches take {readable(sizes.most)} (unit {sizes.where!r}), and the disk of {str(self.folder)!r} has "
                f"{readable(free)} left. Make room, choose another `cache_folder`, or give fewer or smaller images "
                "(data.calibration_samples, data.crop), cache_dtype='bfloat16' or a larger memory_budget."
            )
        return "disk"

    def text(self, sizes: CacheSizes, tier: Tier) -> str:
        """One line: how large caches become, and where they are kept."""
        kind = "host" if tier == "device" and self.device.type == "cpu" else tier
        place = {"device": "on the device", "host": "in host memory", "disk": f"on disk below {str(self.folder)!r}"}
        budget = "half of the free memory" if self.budget is None else readable(self.budget)
        return f"caches: {readable(sizes.most)} at most (unit {sizes.where!r}), {place[kind]}; budget {budget}"

    def _allowed(self, free: int) -> int:
        return free // 2 if self.budget is None else min(free, self.budget)

    def _free_on_device(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free


def free_memory() -> int:
    """Bytes of host memory that this machine, or the container, has to give; all it has where that is not told."""
    if not sys.platform.startswith("linux"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    told = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = int(told[1]) * 1024 if told else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for names in _GROUPS:
        paths = [Path("/sys/fs/cgroup", name) for name in names]
        try:
            limit, used = (int(path.read_text()) for path in paths)
            counts = paths[0].with_name("memory.stat").read_text()
        except (OSError, ValueError):  # no such group, or "max"
            continue
        # Files that were read count as used until somebody needs the memory.
        cached = re.search(r"^(?:total_)?inactive_file (\d+)$", counts, re.MULTILINE)
        free = min(free, max(limit - used + (int(cached[1]) if cached else 0), 0))
    return free


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
