"""What each weight and each activation costs the network's predictions: what mixed precision goes by."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lightning_ptq.calibration import Gather, observe
from lightning_ptq.config import QuantConfig
from lightning_ptq.graph.units import Chain
from lightning_ptq.layers import QuantizedLayer
from lightning_ptq.losses.prediction import prediction_errors
from lightning_ptq.losses.reconstruction import squared_errors
from lightning_ptq.metrics import has_scores
from lightning_ptq.quantizers import float_mode, forget_ranges
from lightning_ptq.sensitivity import BITS, Kind, alone_at, quantizers_of
from lightning_ptq.store import Store, chunks, run_chunked, widened

# Share of a weight's squared error that counts where its rounding will be learned, at each number of bits. Less than
# learning it alone leaves (0.5, 0.6, 0.7, 0.9 at 2, 3, 4, 8 bits: `python -m benchmarks.rounding_gain`), as corrections
# and the last epoch take more from weights than from activations; docs/accuracy.md has what other shares give. Those at
# 5 and 6 bits lie between.
LEARNED = {2: 0.05, 3: 0.1, 4: 0.15, 5: 0.25, 6: 0.5, 8: 1.0}

# Kind and name of a tensor, bits -> what it costs.
Divergences = dict[tuple[Kind, str, int], float]


def divergences(
    teacher: Chain,
    student: Chain,
    images: Tensor,
    config: QuantConfig,
    device: torch.device,
    gather: Gather,
    learned: bool,
    among: Collection[tuple[Kind, str]] | None = None,
    store: Store | None = None,
    say: Callable[[str], object] = str,
) -> Divergences:
    """How far the network's output leaves the teacher's if one tensor alone is quantized, at each of `BITS`.

    That is `prediction_errors` in nats, mean over images and processes; the squared error of a part's output. The
    student must have no ranges yet, and has none afterwards. Costs, for each tensor and number of bits, a pass over the
    images from its unit to the end.

    Args:
        images: (N, C, H, W) of this process. gather: tensor -> that tensor of every process.
        learned: weights will be rounded by learning, not to nearest: only the share `LEARNED` of their error counts.
        among: kinds and names of the tensors to look at; None takes all.
        store: for one unit's input and output, and the network's; None takes where the images lie.
        say: is told at each quarter how long the rest takes.

    Raises:
        PTQError: what `observe` raises.
    """
    seen = observe(student, images, device, gather)
    final = run_chunked(teacher, images, device, store)
    comparable = has_scores(final) and not student.is_part
    errors = prediction_errors if comparable else squared_errors
    size = len(next(chunks(images)))  # as many as pass through the whole network at once
    found: Divergences = {}
    x, began = images, time.monotonic()
    chosen = [q[:2] for unit in student.units for q in quantizers_of(unit) if among is None or q[:2] in among]

    @torch.no_grad()
    def lost(k: int) -> Tensor:
        each, done = list[Tensor](), 0
        for some in chunks(x, size):  # fewer rows where a unit's input is larger than the images
            out = teacher(student.units[k](widened(some.to(device))), start=k + 1)
            each.append(errors(out, final[done : done + len(some)].to(device)))
            done += len(some)
        return torch.cat(each).mean()

    with float_mode(student):
        for k, unit in enumerate(student.units):
            for kind, name, quantizer, layer in quantizers_of(unit):
                if (kind, name) not in chosen:
                    continue
                for bits in BITS:
                    partly = displaced(layer, LEARNED[bits]) if learned and layer is not None else nullcontext()
                    with alone_at(bits, quantizer, layer, seen, config), partly:
                        nats = lost(k)
                    found[kind, name, bits] = float(torch.stack(list(gather(nats))).mean())
                done, total = len(found) // len(BITS), len(chosen)
                if 4 * done // total > 4 * (done - 1) // total and done < total:
                    # At most: the further behind a tensor lies, the less there is to compute.
                    left = (time.monotonic() - began) * (total - done) / done
                    say(f"mixed precision: {done} of {total} tensors are tried, at most {left:.0f} s to go")
            if k < len(student) - 1:
                x = run_chunked(teacher.units[k], x, device, store)
    forget_ranges(student)
    return found


@contextmanager
def displaced(layer: QuantizedLayer, share: float) -> Iterator[None]:
    """Inside, `layer` computes with a weight that has this share of its quantizer's squared error; no other layer does.

    The float network has the same Parameter, so that another takes its place here.
    """
    weight, quantizer = layer.weight, layer.weight_quantizer
    moved = torch.lerp(weight.detach(), quantizer(weight.detach()), share**0.5)
    layer.weight, quantizer.enabled = nn.Parameter(moved, requires_grad=False), False
    try:
        yield
    finally:
        layer.weight, quantizer.enabled = weight, True
