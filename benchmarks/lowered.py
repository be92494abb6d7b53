"""Exported programs in int8 kernels: what agrees with the simulation, and how fast they are.

    python -m benchmarks.lowered --root FOLDER      # run it with nothing beside it

ResNet-20 and MobileNetV2 with their trained weights, and networks of torchvision, untrained but with the batch-norm
statistics of real images, at W8A8 with `placement: hardware`, rounded to nearest. One thread; the ways to run a network
take turns, a figure is the median over the repeats, and ratios are to the float network, eager.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lightning_ptq as ptq
from benchmarks.common import DEFAULT_ROOT, calibrate
from benchmarks.parity import network
from lightning_ptq.export import compare_lowered
from lightning_ptq.export.lowering import compiled

QUANT = ptq.QuantConfig(8, 8, placement="hardware", weight_symmetric=True)


def go(name: str, root: Path, images: int, batches: list[int], repeats: int) -> None:
    """Print the rows of one network."""
    model, seen, others = network(name, root, images)
    module = ptq.PTQModule(model, QUANT, "nearest", batch_size=8, seed=0, report=False)
    data = ptq.CalibrationDataModule.from_loaders([seen], calibration_samples=len(seen))
    with tempfile.TemporaryDirectory() as folder:
        calibrate(module, data, folder)
        path = Path(folder, "model.pt2")
        print(name, ptq.export_pt2(module, path, others).text().split("; ", 1)[1], flush=True)
        counters.clear()
        report = compare_lowered(module, path, others)
        calls = {key: counters["inductor"][f"{key}_unary_lower_count"] for key in ("qconv", "qlinear")}
        print(name, report.text().split(" in ", 1)[1], calls, flush=True)
        for batch in batches:
            torch._dynamo.reset()
            ways = {
                "float": model,
                "float, compiled": compiled(model),
                "int8": ptq.lower_pt2(path, compile=False),
                "int8, compiled": ptq.lower_pt2(path),
            }
            x = others[:batch].contiguous()
            seconds = {way: times(run, x) for way, run in ways.items()}  # compiles, and shows what a first call takes
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(repeats):
                for way, run in ways.items():
                    taken[way].append(times(run, x))
            middle = {way: median(values) for way, values in taken.items()}
            for way, value in middle.items():
                print(
                    f"{name:<12} batch {batch:>2} {way:<16} {1000 * value:>8.2f} ms, float/this "
                    f"{middle['float'] / value:>5.2f}; first call {seconds[way]:>6.2f} s",
                    flush=True,
                )


@torch.no_grad()
def times(run: object, x: Tensor) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run(x)  # type: ignore[operator]
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/, val/ and teachers/")
    parser.add_argument("--models", nargs="+", default=["resnet20", "mobilenetv2", "resnet18", "mobilenet_v2"])
    parser.add_argument("--images", type=int, default=32, help="photos' crops for torchvision's networks")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in args.models:
        go(name, args.root, args.images, args.batches, args.repeats)


if __name__ == "__main__":
    main()
