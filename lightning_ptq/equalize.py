"""Channels of a layer norm's output are brought to one range, so that one scale serves them all.

The factors and shifts that do it are folded into the norm and, inverted, into the linear layers that read it: both
networks compute what they did before, an integer network stays as it is, and nothing is left to simulate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from lightning_ptq.calibration import watch
from lightning_ptq.config import NormScaling
from lightning_ptq.graph.norms import NormGroup
from lightning_ptq.graph.units import Chain
from lightning_ptq.quantizers import ActQuantizer

# SmoothQuant's alpha: how much of the difference between channels goes to the weights.
MIGRATION = 0.5
# Smallest range of a channel relative to the mean one: a channel that hardly moves is not blown up.
_LEAST = 1e-2


def equalize_norms(
    student: Chain,
    images: Tensor,
    how: NormScaling,
    device: torch.device,
    gather: Callable[[Tensor], Iterable[Tensor]],
) -> None:
    """Rescale and shift the channels of every norm in `student.norms`, in place; the function stays.

    Norms and float weights are shared with the teacher, which therefore changes in the same way.

    Args:
        images: (N, C, H, W) of this process; ranges are means over its batches, and over processes.
        how: "ranges" gives every channel the same middle and width, as RepQ-ViT does (Li et al. 2023) but with shifts
            that need not be whole steps; "smooth" divides by max|x|^0.5 / max|w|^0.5 (SmoothQuant, Xiao et al. 2023).
        gather: tensor -> that tensor of every process.

    Raises:
        PTQError: images the network can't take.
    """
    if how == "none" or not student.norms:
        return
    quantizers = [_quantizer(student, group) for group in student.norms]
    ends: dict[ActQuantizer, list[Tensor]] = {quantizer: [] for quantizer in quantizers}
    watch(student, {q: partial(_note, found) for q, found in ends.items()}, images, device)
    for group, quantizer in zip(student.norms, quantizers, strict=True):
        low, high = torch.stack(list(gather(torch.stack(ends[quantizer]).mean(0)))).mean(0)  # (C,)
        norm, layers = student.find(group.norm), [student.find(name) for name in group.layers]
        weights = torch.stack([_weight(layer).abs().amax(0) for layer in layers]).amax(0)  # (C,)
        fold(norm, layers, *factors(low, high, weights, how))


def factors(low: Tensor, high: Tensor, weights: Tensor, how: NormScaling) -> tuple[Tensor, Tensor]:
    """(factor, shift), all (C,): channels become (x + shift) / factor.

    Args:
        low, high: ends of each channel. weights: largest weight that reads it.
    """
    low, high = low.double(), high.double()
    if how == "ranges":
        width, shift = (high - low) / 2, -(high + low) / 2
    else:
        largest = torch.maximum(high.abs(), low.abs())
        width = largest**MIGRATION / weights.double().clamp(min=1e-8) ** (1 - MIGRATION)
        shift = torch.zeros_like(width)
    mean = width.mean()
    if not bool(torch.isfinite(mean)) or float(mean) == 0.0:
        return torch.ones_like(width), torch.zeros_like(width)
    return (width / mean).clamp(min=_LEAST), shift


@torch.no_grad()
def fold(norm: nn.Module, layers: list[nn.Module], factor: Tensor, shift: Tensor) -> None:
    """Make the norm give (x + shift) / factor and the layers that read it undo that, computed in float64."""
    for parameter, value in ((norm.weight, 0.0), (norm.bias, shift)):
        assert isinstance(parameter, Tensor)
        parameter.copy_((parameter.double() + value) / factor)
    for layer in layers:
        weight, bias = _weight(layer), layer.bias
        assert isinstance(bias, Tensor)
        bias.copy_(bias.double() - weight.double() @ shift)
        weight.copy_(weight.double() * factor)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _quantizer(student: Chain, group: NormGroup) -> ActQuantizer:
    quantizer = student.find(group.quantizer)
    assert isinstance(quantizer, ActQuantizer)
    return quantizer


def _note(ends: list[Tensor], x: Tensor) -> None:
    rows = x.detach().float().flatten(0, -2)  # (rows, C)
    ends.append(torch.stack([rows.amin(0), rows.amax(0)]))
