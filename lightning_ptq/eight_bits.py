"""What every network should survive: eight bits everywhere, rounded to nearest. If one does not, which tensor is it?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_ptq.calibration import alone, estimate_ranges
from lightning_ptq.config import QuantConfig
from lightning_ptq.equalize import equalize
from lightning_ptq.errors import PTQError
from lightning_ptq.graph import ChainPair
from lightning_ptq.metrics import classes, decibels, has_scores, signal_and_noise
from lightning_ptq.quantizers import ActQuantizer, act_quantizers, forget_ranges, weight_quantizers
from lightning_ptq.sensitivity import Sensitivity, sensitivities
from lightning_ptq.store import run_chunked
from lightning_ptq.weights import WeightQuantizer

# Least agreement with the teacher, and least signal to noise ratio where there are no classes, that raise no question.
LEAST_AGREEMENT, LEAST_SQNR_DB = 97.0, 20.0
# Images of 224 pixels that a plan looks at; of larger ones fewer.
_PLAN_IMAGES, _PLAN_SIZE, _LEAST_PLANNED = 64, 3 * 224**2, 4
# A tensor is to blame if its share of the error is that large.
_BLAME = 0.1


@dataclass(frozen=True)
class EightBits:
    """How the network does with eight bits for all weights and activations, rounded to nearest.

    Attributes:
        agreement: percent of images (or pixels) for which the teacher predicts the same class; None without classes.
        sqnr_db: of the output. images: how many were looked at.
        causes: (tensor, its share of the error), the largest first; empty where all is well.
    """

    agreement: float | None
    sqnr_db: float
    images: int
    causes: tuple[tuple[str, float], ...]

    @property
    def survives(self) -> bool:
        """Whether the network can be expected to do well with eight bits."""
        return self.agreement >= LEAST_AGREEMENT if self.agreement is not None else self.sqnr_db >= LEAST_SQNR_DB

    def text(self, of: int = 0) -> str:
        """One line, and a warning where it is due. `of`: how many images there are, of which some were looked at."""
        images = f"{self.images} of {of} images for a quick look" if of > self.images else f"{self.images} images"
        told = "" if self.agreement is None else f"{self.agreement:.1f} % agreement with the original, "
        line = f"with 8 bits everywhere, rounded to nearest, {images}: {told}output SQNR {self.sqnr_db:.1f} dB"
        if self.survives:
            return line
        causes = ", ".join(f"{name} ({100 * share:.0f} % of the error)" for name, share in self.causes)
        return (
            f"{line}\nwarning: that is little for 8 bits. What costs most: {causes}. Give it more bits by "
            "quant.overrides (act_bits: 16), or keep the module out with leaf_modules."
        )


def eight_bits(chains: ChainPair, images: Tensor, quant: QuantConfig, device: torch.device) -> EightBits:
    """Quantize the student to eight bits, compare it with the teacher on `images` (N, C, H, W), and undo that.

    What `equalize` does stays: both networks compute what they did.

    Raises:
        PTQError: the student has ranges already; NaN or infinite activations; images the network can't take.
    """
    teacher, student = chains.teacher, chains.student
    if any(q.enabled for q in weight_quantizers(student)):
        raise PTQError("eight bits are tried before calibration, and this network has ranges already.")
    equalize(student, images, quant, device, alone)
    quantizers: list[ActQuantizer | WeightQuantizer] = [*act_quantizers(student), *weight_quantizers(student)]
    before = [q.bits for q in quantizers]
    try:
        for q in quantizers:
            q.set_bits(max(8, q.bits))  # an override that was given against this very warning
        estimate_ranges(student, images, quant, device, alone)
        expected, actual = (run_chunked(chain, images, device) for chain in (teacher, student))
    finally:
        forget_ranges(student)
        for q, bits in zip(quantizers, before, strict=True):
            q.set_bits(bits)
    agreement = None
    if has_scores(expected) and not student.is_part:
        agreement = 100.0 * float((classes(expected) == classes(actual)).float().mean())
    found = EightBits(agreement, decibels(*signal_and_noise(actual, expected).tolist()), len(images), ())
    return found if found.survives else replace(found, causes=causes(chains, images, quant, device))


def causes(
    chains: ChainPair, images: Tensor, quant: QuantConfig, device: torch.device
) -> tuple[tuple[str, float], ...]:
    """(tensor, its share of the error) for all with a large share, each quantized to eight bits alone."""
    found = sensitivities(chains.teacher, chains.student, images, quant, device, bits=(8,))
    total = sum(s.error for s in found) or 1.0
    shares = sorted(((title(s, chains), s.error / total) for s in found), key=lambda pair: -pair[1])
    return tuple((name, share) for name, share in shares if share >= _BLAME) or tuple(shares[:1])


def images_to_try(image_shape: Sequence[int]) -> int:
    """How many images of a shape (C, H, W) tell enough about a network without taking long."""
    return max(_LEAST_PLANNED, min(_PLAN_IMAGES, _PLAN_IMAGES * _PLAN_SIZE // math.prod(image_shape)))


def title(tensor: Sensitivity, chains: ChainPair) -> str:
    """What a user calls a tensor: by the layers that it belongs to."""
    if tensor.kind == "weight":
        return f"the weight of {tensor.name!r}"
    readers = [repr(layer.name) for layer in chains.layers if layer.reads == tensor.name]
    return f"what {', '.join(readers)} read{'s' * (len(readers) == 1)}" if readers else f"a product's {tensor.name!r}"
