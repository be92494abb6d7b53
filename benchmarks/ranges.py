"""Range search: the QDrop authors' grid and ours, on the same tensors of the trained ResNet-20 and 256 images.

    python -m benchmarks.ranges --bits w2a2 w2a4

Theirs, as their observers do it: for every batch of 32 images 100 ranges (and every zero point where the tensor has
both signs) are tried on the whole tensor with the error |x - q|^2.4, and the best ranges are averaged over batches;
weights the same way in every channel. Ours: `estimate_ranges`, its float forward passes included. Both are timed in
units of F, alternating, median of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import DEFAULT_ROOT, Yardstick, trained
from lightning_ptq import ImageFolderData, QuantConfig
from lightning_ptq.calibration import RANGE_IMAGES, estimate_ranges
from lightning_ptq.functional import integer_range, qparams
from lightning_ptq.graph import build_chain
from lightning_ptq.layers import quantized_layers
from lightning_ptq.quantizers import act_quantizers

BATCH = 32


def grid_search(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Ends (R,) of the best range of every row of x (R, n), by trying all candidates on all of x."""
    qmin, qmax = integer_range(bits, False)
    low, high = torch.aminmax(x, dim=1)
    one_sided = bool((low >= 0).all()) or bool((high <= 0).all())
    best = torch.full_like(low, float("inf"))
    best_low, best_high = low.clone(), high.clone()
    for i in range(1, 101):
        if one_sided:
            width = torch.maximum(low.abs(), high) * i / 100
            candidates = [
                (torch.zeros_like(width), width) if bool((low >= 0).all()) else (-width, torch.zeros_like(width))
            ]
        else:
            width = (high.clamp(min=0) - low.clamp(max=0)) * i / 100
            step = width / (qmax - qmin)
            candidates = [(-zero * step, width - zero * step) for zero in range(qmin, qmax + 1)]
        for new_low, new_high in candidates:
            scale, zero_point = qparams(new_low, new_high, bits, False)
            error = error_of(x, scale, zero_point, bits, 2.4)
            better = error < best
            best = torch.where(better, error, best)
            best_low, best_high = torch.where(better, new_low, best_low), torch.where(better, new_high, best_high)
    return best_low, best_high


def error_of(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, power: float) -> Tensor:
    """Mean of |fake-quantized - x| ** power in every row (R, n) -> (R,)."""
    qmin, qmax = integer_range(bits, False)
    scale, zero_point = scale.view(-1, 1), zero_point.view(-1, 1)
    q = (torch.round(x / scale) + zero_point).clamp(qmin, qmax)
    return ((q - zero_point) * scale - x).abs().pow(power).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/ and teachers/")
    parser.add_argument("--bits", nargs="+", default=["w2a2", "w2a4"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = trained("resnet20", args.root)
    data = ImageFolderData(str(args.root), resize=None, crop=None, calibration_samples=RANGE_IMAGES, seed=0)
    images, device = data.calibration_images(), torch.device("cpu")
    print(f"{'':6} {'theirs, F':>10} {'ours, F':>10} {'MSE ours/theirs: mean':>22} {'max':>7} {'quantizers':>11}")
    for bits in args.bits:
        config = QuantConfig(weight_bits=int(bits[1]), act_bits=int(bits[3]))
        student = build_chain(model, config, "block").student
        tensors = tensors_of(student, images)
        yardstick = Yardstick(model, images)
        times: dict[str, list[float]] = {"f": yardstick.seconds, "theirs": [], "ours": []}
        for _ in range(args.repeats):
            yardstick.measure()
            start = time.perf_counter()
            theirs = [search_batches(x, q_bits) for x, q_bits in tensors]
            times["theirs"].append(time.perf_counter() - start)
            start = time.perf_counter()
            estimate_ranges(student, images, config, device, lambda t: t[None])
            times["ours"].append(time.perf_counter() - start)
        f = statistics.median(times["f"])
        quantizers = [layer.weight_quantizer for _, layer in quantized_layers(student)] + act_quantizers(student)
        ours = [(q.scale.flatten(), q.zero_point.flatten()) for q in quantizers]
        ratios = [
            float(error_of(whole(x), *mine, q_bits, 2.0).mean() / error_of(whole(x), *other, q_bits, 2.0).mean())
            for (x, q_bits), mine, other in zip(tensors, ours, theirs, strict=True)
        ]
        print(
            f"{bits:6} {statistics.median(times['theirs']) / f:10.1f} {statistics.median(times['ours']) / f:10.2f} "
            f"{statistics.geometric_mean(ratios):22.4f} {max(ratios):7.4f} {len(ratios):11}"
        )


def tensors_of(student: torch.nn.Module, images: Tensor) -> list[tuple[list[Tensor], int]]:
    """(what it quantizes, its bits) for every quantizer, weights first: a list of batches, each (rows, values)."""
    result = [([layer.weight.flatten(1)], layer.weight_quantizer.bits) for _, layer in quantized_layers(student)]
    seen: dict[object, list[Tensor]] = {q: [] for q in act_quantizers(student)}
    hooks = [
        q.register_forward_pre_hook(lambda q, args: seen[q].append(args[0].reshape(1, -1)))
        for q in act_quantizers(student)
    ]
    with torch.no_grad():
        for batch in images.split(BATCH):
            student(batch)
    for hook in hooks:
        hook.remove()
    return result + [(batches, q.bits) for q, batches in zip(act_quantizers(student), seen.values(), strict=True)]


def search_batches(batches: list[Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """Their scale and zero point: best ranges of every batch, averaged."""
    found = [grid_search(batch, bits) for batch in batches]
    low, high = (torch.stack(ends).mean(0) for ends in zip(*found, strict=True))
    return qparams(low, high, bits, False)


def whole(batches: list[Tensor]) -> Tensor:
    return torch.cat(batches, dim=1)


if __name__ == "__main__":
    main()
