"""Host memory of calibrating the unit of a large network that has the largest caches: `python -m benchmarks.memory`.

ResNet-50 of torchvision, untrained but with settled batch norms, reads 64 synthetic images of 1224 x 1632 pixels; `fit`
runs from its start (ranges, Fisher information, the units before) to the end of that unit, with a few steps each. A row
has the peak of the process as a whole (`ru_maxrss`), that of what is not backed by a file (sampled every 10 ms), the
estimate, and the bound: both networks' parameters, one step of the unit and the budget. The step is measured in a
process of its own, which does nothing else, on one batch of random activations. Sizes are in GiB. Rows are added to
benchmarks/memory.csv; about 40 GB of disk are needed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_ptq as ptq
from benchmarks.census import random_model
from benchmarks.common import append, calibrate, commit, in_process
from benchmarks.eight_bits import crops, settle
from lightning_ptq.drop import DropMask
from lightning_ptq.losses import reconstruction_loss
from lightning_ptq.memory import CacheSizes, bytes_of, unit_shapes
from lightning_ptq.quantizers import act_quantizers
from lightning_ptq.summary import peak_rss_bytes

GIB = 2**30


class Peak:
    """Largest resident memory of this process that is not backed by a file, in bytes, while the block runs."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = self.now(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, self.now())

    @staticmethod
    def now() -> int:
        """What it is now."""
        status = Path("/proc/self/status").read_text()
        return 1024 * sum(int(n) for n in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.MULTILINE))


class Synthetic:
    """Batches of one smooth random image each, made when they are asked for."""

    def __init__(self, count: int, height: int, width: int) -> None:
        self.count, self.size = count, (height, width)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.count):
            coarse = torch.randn(1, 3, *(n // 16 for n in self.size), generator=generator)
            yield nn.functional.interpolate(coarse, self.size, mode="bilinear")


def module_of(a: argparse.Namespace) -> ptq.PTQModule:
    """The network to calibrate; the last epoch, which is no unit, is left out."""
    model = random_model("resnet50")
    for k in range(a.stages, 4):
        setattr(model, f"layer{k + 1}", nn.Identity())
        model.fc = nn.Linear(128 * 2**a.stages, 1000)
    settle(model, crops(64, 64, seed=1))
    return ptq.PTQModule(
        model,
        ptq.QuantConfig(4, 4),
        "qdrop",
        steps_per_unit=a.steps,
        network_steps=0,
        batch_size=a.batch,
        cache=a.cache,
        memory_budget=a.budget,
        cache_dtype=a.dtype,
        seed=0,
    )


def largest(module: ptq.PTQModule, a: argparse.Namespace) -> tuple[int, list[tuple[int, ...]], CacheSizes]:
    """Number of the unit with the largest caches, shapes of all, and sizes."""
    shapes = unit_shapes(module.teacher, (3, a.height, a.width))
    sizes = CacheSizes.of(module.teacher, shapes, a.images, a.dtype)
    return module.teacher.names.index(sizes.where), shapes, sizes


def fit(a: argparse.Namespace) -> dict[str, Any]:
    """The fit up to that unit."""
    start, module = time.monotonic(), module_of(a)
    unit, _, sizes = largest(module, a)
    data = ptq.CalibrationDataModule.from_loaders(Synthetic(a.images, a.height, a.width), calibration_samples=a.images)
    networks = sum(t.nbytes for t in module.state_dict().values())
    with tempfile.TemporaryDirectory(dir=a.folder) as folder, Peak() as peak:
        calibrate(module, data, folder, max_epochs=unit + 1)
    report = module.reports[unit]
    return {
        "unit": report.name,
        "accepted": report.accepted,
        "estimate": sizes.most,
        "networks": networks,
        "peak_anonymous": peak.bytes,
        "peak_rss": peak_rss_bytes(),
        "seconds": round(time.monotonic() - start),
    }


def step(a: argparse.Namespace) -> dict[str, Any]:
    """Two steps of the unit, as a fit makes them, on random activations: what they need above all that was there."""
    module = module_of(a)
    unit, shapes, _ = largest(module, a)
    student, drop = module.student.units[unit], DropMask(0.5)
    for q in act_quantizers(student):
        q.set_range(torch.tensor(0.2), torch.tensor(0.0))
    module.teacher.requires_grad_(False)
    module._select(unit)
    optimizer = module.configure_optimizers()
    before = Peak.now()
    with Peak() as peak:
        for _ in range(2):
            read = [torch.randn(a.batch, *shapes[unit]).relu_() for _ in "st"]
            read = [x.contiguous(memory_format=torch.channels_last) for x in read]
            with torch.no_grad():
                target = module.teacher.units[unit](read[1])
            drop.seed(0, 1)
            keep = drop.keep(read[0])
            assert keep is not None
            out = student(torch.lerp(read[1], read[0], keep))
            reconstruction_loss(out, target, torch.ones(out.shape[1])).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            del read, target, out, keep
    return {"step": peak.bytes - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="leave out the stages behind so many of the four")
    parser.add_argument("--height", type=int, default=1224)
    parser.add_argument("--width", type=int, default=1632)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cache", default="auto")
    parser.add_argument("--budget", default="3GB")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--folder", help="for the caches; that for temporary files by default")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/memory.csv"))
    parser.add_argument("--only", choices=("fit", "step"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.only:
        warnings.simplefilter("ignore")
        print(json.dumps({"fit": fit, "step": step}[a.only](a)))
        return
    names = ("stages", "height", "width", "images", "batch", "steps", "cache", "budget", "dtype")
    settings = {name: getattr(a, name) for name in names}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    options += ["--folder", a.folder] if a.folder else []
    found = {
        key: value for only in ("step", "fit") for key, value in in_process("memory", *options, "--only", only).items()
    }
    bound = found["networks"] + found["step"] + (bytes_of(a.budget) or math.nan)
    sizes = ("step", "estimate", "networks", "peak_anonymous", "peak_rss")
    row = settings | {key: f"{value / GIB:.2f}" if key in sizes else value for key, value in found.items()}
    row |= {"bound": f"{bound / GIB:.2f}", "ratio": f"{found['peak_rss'] / bound:.2f}", "commit": commit()}
    append(a.out, row, [row])
    print("\n".join(f"{key:15} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
