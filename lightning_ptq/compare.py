"""Two artifacts side by side: do they give the same classes, how good are they, how large and how fast?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.errors import PTQError
from lightning_ptq.evaluation import class_labels, images_and_labels
from lightning_ptq.export.onnx import load_onnx, require
from lightning_ptq.export.packed import load_packed
from lightning_ptq.export.pt2 import load_pt2
from lightning_ptq.graph.trace import pick_output
from lightning_ptq.metrics import MeanRate, OutputSQNR, classes, has_scores
from lightning_ptq.module import PTQModule

# The name of the model itself, before quantization.
FLOAT = "float"
_TIMED = 21


@dataclass(frozen=True)
class Artifact:
    """Something that computes a network's output.

    Attributes:
        name: the file, or "float".
        size: bytes of the file, or of the model's state.
        runtime: what runs it.
        run: images (N, C, H, W) -> output, on the CPU; several outputs, as of a part of a model, side by side.
    """

    name: str
    size: int
    runtime: str
    run: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Side:
    """What is known of one of the two.

    Attributes:
        size: bytes.
        top1: percent of images (or pixels) with the labelled class; None without labels.
        milliseconds: median time of one image by itself, the two taking turns; it says something of the networks only
            where both have the same runtime.
    """

    name: str
    size: int
    runtime: str
    top1: float | None
    milliseconds: float


@dataclass(frozen=True)
class Comparison:
    """Two artifacts on the same images.

    Attributes:
        agreement: percent of images (or pixels) with the same class; None without classes.
        sqnr_db: signal of the first one's output to its difference from the second one's.
    """

    first: Side
    second: Side
    images: int
    agreement: float | None
    sqnr_db: float

    def text(self) -> str:
        """A table, a row for each of the two, and a line on both."""
        sides = (self.first, self.second)
        width = max(len(side.name) for side in sides)
        rows = [f"{'':<{width}}  {'bytes':>13}  {'top-1 %':>8}  {'ms an image':>11}  in"]
        for side in sides:
            top1 = "-" if side.top1 is None else f"{side.top1:.2f}"
            numbers = f"{side.size:>13,}  {top1:>8}  {side.milliseconds:>11.2f}"
            rows.append(f"{side.name:<{width}}  {numbers}  {side.runtime}")
        if self.first.runtime != self.second.runtime:
            rows.append("Times are of two runtimes: they do not tell which network is faster.")
        same = "" if self.agreement is None else f"{self.agreement:.2f} % of classes agree, "
        return "\n".join([*rows, f"{self.images} images: {same}SQNR {self.sqnr_db:.1f} dB"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)

    def shortfalls(self, least_agreement: float | None, least_sqnr_db: float | None) -> list[str]:
        """What stays below its threshold, in words; an agreement that there can't be does not count."""
        measured = (
            ("agreement", self.agreement, least_agreement, "%"),
            ("SQNR", self.sqnr_db, least_sqnr_db, "dB"),
        )
        return [
            f"{name} {value:.2f} {unit} is below {least:g} {unit}"
            for name, value, least, unit in measured
            if value is not None and least is not None and value < least
        ]


def open_artifact(name: str, model: nn.Module | None = None) -> Artifact:
    """What runs an exported file, a checkpoint or the model itself.

    Args:
        name: a path that ends in .onnx, .pt2, .ptq or .ckpt, or "float".
        model: the trained network; .onnx and .pt2 do without.

    Raises:
        PTQError: a name that stands for nothing, a file that can't be read, or a missing model.
    """
    path, kind = Path(name), FLOAT if name == FLOAT else Path(name).suffix
    if kind not in (FLOAT, ".onnx", ".pt2", ".ptq", ".ckpt"):
        raise PTQError(f"{name!r} can't be compared. Give a file that ends in .onnx, .pt2, .ptq or .ckpt, or float.")
    if kind != FLOAT and not path.is_file():
        raise PTQError(f"{name!r} is no file, seen from {str(Path.cwd())!r}.")
    if kind in (".onnx", ".pt2"):
        runtime = "ONNX Runtime" if kind == ".onnx" else "PyTorch"
        return Artifact(name, path.stat().st_size, runtime, _runtime(path))
    if model is None:
        raise PTQError(f"{name!r} needs the model's code, and none is given. Give the model, or the run's config.")
    if kind == FLOAT:
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        return Artifact(name, size, "PyTorch", _module(model.eval()))
    loaded = load_packed(path, model) if kind == ".ptq" else PTQModule.load_from_checkpoint(path, model=model)
    return Artifact(name, path.stat().st_size, "PyTorch, simulated", _module(loaded))


def _runtime(path: Path) -> Callable[[Tensor], Tensor]:
    if path.suffix == ".onnx":
        require("onnxruntime")
    try:
        outputs = load_onnx(path) if path.suffix == ".onnx" else load_pt2(path)
    except Exception as error:  # whatever a runtime raises
        raise PTQError(f"{str(path)!r} can't be read: {' '.join(str(error).split())[:300]}. Export it anew.") from error

    def run(images: Tensor) -> Tensor:
        found = outputs(images)
        # (N, 1, numbers) are no scores of classes.
        return found[0] if len(found) == 1 else torch.cat([x.float().flatten(1) for x in found], 1)[:, None]

    return run


def _module(module: nn.Module) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        output = pick_output(module(images))
        if not isinstance(output, Tensor):
            raise PTQError(
                f"the model returns a {type(output).__name__}; networks that return a tensor are compared. Of a "
                "detector, give two exported files: they hold the part that is quantized."
            )
        return output

    return run


def compare(first: Artifact, second: Artifact, batches: Iterable[Any]) -> Comparison:
    """Run both on the same images.

    Args:
        batches: images (N, C, H, W), alone or with labels of images or pixels, as a validation loader gives them.

    Raises:
        PTQError: no images, or outputs of different shapes.
    """
    sides = (first, second)
    agreement, sqnr, rates = MeanRate(), OutputSQNR(), (MeanRate(), MeanRate())
    count, one = 0, None
    for batch in batches:
        images, labels = images_and_labels(batch)
        outputs = [side.run(images).float() for side in sides]
        if outputs[0].shape != outputs[1].shape:
            raise PTQError(
                f"outputs can't be compared: {tuple(outputs[0].shape)} of {first.name!r} and {tuple(outputs[1].shape)} "
                f"of {second.name!r}. Give two artifacts of the same network."
            )
        count, one = count + len(images), images[:1] if one is None else one
        sqnr.update(outputs[1], outputs[0])
        if not has_scores(outputs[0]):
            continue
        predicted = [classes(output) for output in outputs]
        agreement.update(predicted[1], predicted[0])
        labels = None if labels is None else class_labels(labels, outputs[0])
        if labels is not None:
            counted = labels >= 0
            for rate, prediction in zip(rates, predicted, strict=True):
                rate.update(prediction[counted], labels[counted])
    if one is None:
        raise PTQError("there are no images to compare on. Give validation or calibration images.")
    times = alternately([side.run for side in sides], one)
    measured = zip(sides, rates, times, strict=True)
    left, right = (Side(side.name, side.size, side.runtime, _percent(rate), time) for side, rate, time in measured)
    return Comparison(left, right, count, _percent(agreement), float(sqnr.compute()))


def alternately(runs: Iterable[Callable[[Tensor], Tensor]], images: Tensor, repeats: int = _TIMED) -> list[float]:
    """Median milliseconds of each of `runs` on `images`; they take turns, so that what slows the machine slows all."""
    runs = list(runs)
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(images)
            if repeat:  # the first one warms up
                found.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


def _percent(rate: MeanRate) -> float | None:
    return float(rate.compute()) if rate.total else None
