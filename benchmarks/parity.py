"""Does an exported model do what the simulation did? `python -m benchmarks.parity --root FOLDER`.

ResNet-20 with its trained weights, and networks of torchvision at 8 bits: briefly trained on the shared images
(`--trained FOLDER`, which keeps the weights), or untrained with the batch-norm statistics of real crops. ResNet-20 is
calibrated with qdrop, the others are rounded to nearest; then they are exported to ONNX and to a program of PyTorch and
run on other images. Printed are the classes that agree with the simulation, the signal-to-noise ratio, that of the
simulation itself when it is computed in double precision (if 40 dB or 99.9 % were missed), whether the export passes,
the file's size relative to that of the float network, and the seconds and the peak memory of the export (each row is a
process of its own).
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_ptq as ptq
from benchmarks.census import random_model
from benchmarks.common import DEFAULT_ROOT, calibrate, in_process, trained
from benchmarks.eight_bits import crops, settle
from benchmarks.training import EPOCHS, briefly_trained, resized

ROWS = [
    *(("resnet20", bits, "paper") for bits in ("w4a4", "w3a3", "w2a4", "w2a2", "w8a8")),
    ("resnet20", "w8a8", "hardware"),
    *((name, "w8a8", "paper") for name in (*EPOCHS, "resnet50")),
    *((name, "w8a8", "hardware") for name in EPOCHS),
]


def network(name: str, root: Path, images: int, weights: Path | None) -> tuple[nn.Module, Tensor, Tensor]:
    """(network, images to calibrate with, other images)."""
    if name in ("resnet20", "mobilenetv2") or (weights is not None and name in EPOCHS):
        data = ptq.ImageFolderData(str(root), resize=None, crop=None, calibration_samples=1024 + 256, seed=0)
        data.setup("fit")
        drawn = data.calibration_images()
        if name in EPOCHS:
            assert weights is not None
            return briefly_trained(name, root, weights), resized(drawn[:256]), resized(drawn[256:])
        return trained(name, root), drawn[:256], drawn[256:]
    model = random_model(name)
    settle(model, crops(images, 224, seed=1))
    return model, crops(images, 224, seed=1), crops(images, 224, seed=2)


def go(name: str, bits: str, placement: Any, root: Path, images: int, weights: Path | None) -> str:
    """The row of one network."""
    warnings.simplefilter("ignore")
    model, seen, others = network(name, root, images, weights)
    quant = ptq.QuantConfig(int(bits[1]), int(bits[3]), placement=placement, weight_symmetric=placement == "hardware")
    method: Any = "qdrop" if name == "resnet20" else "nearest"
    module = ptq.PTQModule(model, quant, method, steps_per_unit=100, batch_size=8, seed=0, report=False)
    with tempfile.TemporaryDirectory() as folder:
        data = ptq.CalibrationDataModule.from_loaders([seen], calibration_samples=len(seen))
        calibrate(module, data, folder)
        torch.save(model.state_dict(), Path(folder, "float.pt"))
        told = []
        for kind, export in (("onnx", ptq.export_onnx), ("pt2", ptq.export_pt2)):
            start = time.monotonic()
            report = export(module, Path(folder, f"model.{kind}"), others)
            ratio = report.size / Path(folder, "float.pt").stat().st_size
            own = "" if report.own_sqnr_db is None else f"{report.own_sqnr_db:.1f}"
            figures = f"{report.agreement:>8.2f} {report.sqnr_db:>7.1f} {own:>6} {'yes' if report.passed else 'no':>5}"
            told.append(f"{figures} {ratio:>6.3f} {time.monotonic() - start:>6.1f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"{name:<16} {bits} {placement:<9} {len(others):>6} " + "  |".join(told) + f"  |{peak:>6.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/, val/ and teachers/")
    parser.add_argument("--images", type=int, default=64, help="photos' crops for untrained networks")
    parser.add_argument(
        "--trained", type=Path, help="folder of briefly trained networks; what it lacks is trained first"
    )
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(go(*json.loads(args.one), args.root, args.images, args.trained)))
        return
    columns = " agree %    SQNR    own  pass   size    s"
    print(f"{'':<16} {'':<4} {'':<9} images ONNX:{columns}  | .pt2:{columns}  | GiB")
    for row in ROWS:
        if not args.models or row[0] in args.models:
            options = ["--root", str(args.root), "--images", str(args.images), "--one", json.dumps(row)]
            options += ["--trained", str(args.trained)] if args.trained else []
            print(in_process("parity", *options), flush=True)


if __name__ == "__main__":
    main()
