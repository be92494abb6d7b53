"""Files of one network side by side in ONNX Runtime, on the CPU: `python -m benchmarks.runtimes --root FOLDER`.

float32; ours with 8 bits and placement "hardware", rounded to nearest, without and with corrected biases; and ONNX
Runtime's own static quantization (QDQ, per channel, after its pre-processing) of the float32 file with the same
calibration images, as its defaults have it (int8 activations) and with uint8 activations, which its kernels for x86
are made for. CIFAR-10's networks are trained, and are compared on the validation images; those of torchvision are
untrained, with the batch-norm statistics of real images, and are compared on other crops.

Latency: the sessions take turns, in an order drawn anew for each round, with 1 and 16 images, on one thread and on as
many as ONNX Runtime takes by itself. A row has the median of its milliseconds, and of its time over that of ONNX
Runtime's uint8 file in the same round. Agreement and signal-to-noise ratio are those with the float network. Each
network is a process of its own; rows are added to benchmarks/runtimes.csv, the table is printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_ptq as ptq
from benchmarks.census import random_model
from benchmarks.common import DEFAULT_ROOT, calibrate, commit, complete, in_process, trained
from benchmarks.eight_bits import crops, settle
from lightning_ptq.export.onnx import OPSET, load_onnx

MODELS = ("resnet20", "mobilenetv2", "resnet18", "mobilenet_v2", "resnet50")
TRAINED = MODELS[:2]
THEIRS = "ort uint8"
TIMES = [f"{threads}x{images}" for threads, images in product(("one", "all"), (1, 16))]
COLUMNS = (
    *("model", "kind", "images", "bytes", "size", "agreement", "sqnr_db"),
    *(f"ms_{name}" for name in TIMES),
    *(f"over_ort_{name}" for name in TIMES),
    "commit",
)
# Rounds of a measurement, and the seconds after which it ends with fewer.
ROUNDS, SECONDS = 300, 20.0


def network(name: str, root: Path, images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """(network, images to calibrate with, other images)."""
    if name in TRAINED:
        data = ptq.ImageFolderData(str(root), resize=None, crop=None, calibration_samples=256, seed=0)
        data.setup("fit")
        return trained(name, root), data.calibration_images(), torch.cat([x for x, _ in data.val_dataloader()])
    model, seen = random_model(name), crops(64, 224, seed=1)
    settle(model, seen)
    return model, seen, crops(images, 224, seed=2)


def write(model: nn.Module, seen: Tensor, folder: Path) -> nn.Module:
    """Write one file for each kind to `folder`; the teacher."""
    for kind, corrections in (("ours", False), ("ours, biases", True)):
        quant = ptq.QuantConfig(8, 8, placement="hardware", weight_symmetric=True)
        module = ptq.PTQModule(model, quant, "nearest", corrections=corrections, batch_size=8, seed=0, report=False)
        data = ptq.CalibrationDataModule.from_loaders([seen], calibration_samples=len(seen))
        calibrate(module, data, str(folder / f"run {kind}"))
        ptq.export_onnx(module, folder / f"{kind}.onnx", seen[:16])
    images, sizes = seen[:2], ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        module.teacher,
        (images,),
        folder / "float32.onnx",
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        dynamic_shapes=sizes,
        external_data=False,
        verbose=False,
    )
    quantize_with_ort(folder, seen)
    return module.teacher


def quantize_with_ort(folder: Path, seen: Tensor) -> None:
    """ONNX Runtime's own quantization of the float32 file in `folder`."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(seen.split(8))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    quant_pre_process(folder / "float32.onnx", folder / "prepared.onnx")
    for kind, act in (("ort int8", QuantType.QInt8), (THEIRS, QuantType.QUInt8)):
        quantize_static(
            folder / "prepared.onnx", folder / f"{kind}.onnx", Reader(), per_channel=True, activation_type=act
        )


def latencies(files: dict[str, Path], threads: int, batch: Tensor) -> dict[str, list[float]]:
    """Milliseconds of each file in every round."""
    import onnxruntime

    sessions = {}
    for kind, file in files.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        sessions[kind] = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for _ in range(3):
            sessions[kind].run(None, {"images": batch.numpy()})
    found: dict[str, list[float]] = {kind: [] for kind in files}
    order, until = random.Random(0), time.monotonic() + SECONDS
    for _ in range(ROUNDS):
        for kind in order.sample(list(files), len(files)):
            start = time.perf_counter()
            sessions[kind].run(None, {"images": batch.numpy()})
            found[kind].append(1000 * (time.perf_counter() - start))
        if time.monotonic() > until:
            break
    return found


def go(name: str, root: Path, images: int) -> list[dict[str, Any]]:
    """The rows of one network."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model, seen, others = network(name, root, images)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        folder = Path(place)
        with torch.enable_grad():
            teacher = write(model, seen, folder)
        files = {kind: folder / f"{kind}.onnx" for kind in ("float32", "ours", "ours, biases", "ort int8", THEIRS)}
        expected = torch.cat([teacher(x) for x in others.split(16)]).double()
        rows = {}
        for kind, file in files.items():
            run = load_onnx(file)
            found = torch.cat([run(x)[0] for x in others.split(16)]).double()
            noise = (found - expected).square().sum().clamp(min=1e-30)
            rows[kind] = {
                "model": name,
                "kind": kind,
                "images": len(others),
                "bytes": file.stat().st_size,
                "size": round(file.stat().st_size / files["float32"].stat().st_size, 3),
                "agreement": round(100 * float((found.argmax(1) == expected.argmax(1)).double().mean()), 2),
                "sqnr_db": round(10 * float((expected.square().sum() / noise).log10()), 2),
            }
        for column, (threads, count) in zip(TIMES, product((1, 0), (1, 16)), strict=True):
            measured = latencies(files, threads, others[:count])
            for kind, row in rows.items():
                shares = [a / b for a, b in zip(measured[kind], measured[THEIRS], strict=True)]
                row[f"ms_{column}"] = round(statistics.median(measured[kind]), 3)
                row[f"over_ort_{column}"] = round(statistics.median(shares), 3)
    return [row | {"commit": commit()} for row in rows.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/, val/ and teachers/")
    parser.add_argument("--images", type=int, default=256, help="photos' crops that torchvision's networks see")
    parser.add_argument("--models", nargs="+", default=MODELS, help="only these")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/runtimes.csv"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(go(args.one, args.root, args.images)))
        return
    options = ["--root", str(args.root), "--images", str(args.images)]
    rows = complete(args.out, COLUMNS, args.models, lambda name: in_process("runtimes", *options, "--one", name))
    times = "".join(f"{f'{name} ms':>10} {'/ort':>5}" for name in TIMES)
    print(f"{'':<12} {'':<12} images      bytes  size  agree   SQNR {times}")
    for row in rows:
        times = "".join(f"{row[f'ms_{name}']:>10} {float(row[f'over_ort_{name}']):>5.2f}" for name in TIMES)
        told = f"{row['images']:>6} {row['bytes']:>10} {float(row['size']):>5.3f} {float(row['agreement']):>6.2f}"
        print(f"{row['model']:<12} {row['kind']:<12} {told} {float(row['sqnr_db']):>6.2f} {times}")


if __name__ == "__main__":
    main()
