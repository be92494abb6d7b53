"""Channels of one tensor are brought closer together, so that one scale serves them all.

The factors and shifts that do it are folded into what writes the tensor, a layer norm or a layer, and, inverted, into
the layers that read it: both networks compute what they did before, an integer network stays as it is, and nothing is
left to simulate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_ptq.calibration import watch
from lightning_ptq.config import NormScaling, QuantConfig
from lightning_ptq.errors import PTQError
from lightning_ptq.graph.norms import ChannelGroup
from lightning_ptq.graph.units import Chain
from lightning_ptq.quantizers import ActQuantizer, float_mode
from lightning_ptq.store import chunks

# SmoothQuant's alpha: how much of the difference between channels goes to the weights.
MIGRATION = 0.5
# Smallest range of a channel relative to the mean one: a channel that hardly moves is not blown up.
_LEAST = 1e-2
# Largest change of the output, relative to it, that is rounding, be it at TF32.
_ROUNDING = 1e-2


def equalize(
    student: Chain,
    images: Tensor,
    config: QuantConfig,
    device: torch.device,
    gather: Callable[[Tensor], Iterable[Tensor]],
) -> None:
    """Rescale the channels of every group in `student.norms` and `student.pairs`, in place; the function stays.

    Norms and float weights are shared with the teacher, which therefore changes in the same way.

    Args:
        images: (N, C, H, W) of this process; ranges are means over its batches, and over processes.
        config: how. Norms: "ranges" gives every channel the same middle and width, as RepQ-ViT does (Li et al. 2023)
            but with shifts that need not be whole steps; "smooth" divides by max|x|^0.5 / max|w|^0.5 (SmoothQuant, Xiao
            et al. 2023). Pairs: "smooth" does the same, which is cross-layer equalisation (Nagel et al. 2019) with what
            the layer gives in the place of its weights: scales of its own are per channel. Where a channel's readers
            read nothing else, as depthwise ones do, theirs lose nothing either, and the channels get one range.
        gather: tensor -> that tensor of every process.

    Raises:
        PTQError: images the network can't take, or a network that would not be the same behind it.
    """
    norms = student.norms if config.norms != "none" else ()
    pairs = student.pairs if config.pairs != "none" else ()
    groups = [*norms, *pairs]
    if not groups:
        return
    quantizers = [_quantizer(student, group) for group in groups]
    dims = [1 if isinstance(student.find(group.source), _ConvNd) else -1 for group in groups]
    ends: dict[ActQuantizer, list[Tensor]] = {quantizer: [] for quantizer in quantizers}
    watchers = {q: partial(_note, ends[q], dim) for q, dim in zip(quantizers, dims, strict=True)}
    watch(student, watchers, images, device)
    before = _floating(student, images, device)
    # A batch counts by its images: a short last one has smaller ranges, which must not weigh like the others'.
    shares = torch.tensor([len(some) / len(images) for some in chunks(images)], device=device)
    for group, quantizer in zip(groups, quantizers, strict=True):
        mean = (torch.stack(ends[quantizer]) * shares.view(-1, 1, 1)).sum(0)
        low, high = torch.stack(list(gather(mean))).mean(0)  # (C,)
        source, layers = student.find(group.source), [student.find(name) for name in group.layers]
        weights = torch.stack([largest_by_input(layer) for layer in layers]).amax(0)  # (C,)
        if isinstance(source, nn.LayerNorm):
            fold(source, layers, *factors(low, high, weights, config.norms))
        else:
            free = config.weight_per == "channel" and all(_weight(layer).shape[1] == 1 for layer in layers)
            fold(source, layers, *factors(low, high, weights, "smooth", 1.0 if free else MIGRATION))
    # Whatever the graph was taken for: it may not come to another function.
    after = _floating(student, images, device)
    changed = not float((after - before).norm()) <= _ROUNDING * float(before.norm())
    if changed and torch.equal(after, _floating(student, images, device)):  # else it gives something else each time
        raise PTQError(
            "bringing channels together has changed what the float network computes: it does more between a norm or a "
            "layer and its readers than its graph shows. Give norms='none' and pairs='none', with the network anew."
        )


@torch.no_grad()
def _floating(student: Chain, images: Tensor, device: torch.device) -> Tensor:
    """What the float network gives for two images."""
    with float_mode(student):
        return student.forward(images[:2].to(device))


def factors(
    low: Tensor, high: Tensor, weights: Tensor, how: NormScaling, migration: float = MIGRATION
) -> tuple[Tensor, Tensor]:
    """(factor, shift), all (C,): channels become (x + shift) / factor.

    Args:
        low, high: ends of each channel. weights: largest weight that reads it.
        migration: with "smooth", how much of the difference between channels goes to the weights.
    """
    low, high = low.double(), high.double()
    if how == "ranges":
        width, shift = (high - low) / 2, -(high + low) / 2
    else:
        largest = torch.maximum(high.abs(), low.abs())
        width = largest**migration / weights.double().clamp(min=1e-8) ** (1 - migration)
        shift = torch.zeros_like(width)
    mean = width.mean()
    if not bool(torch.isfinite(mean)) or float(mean) == 0.0:
        return torch.ones_like(width), torch.zeros_like(width)
    return (width / mean).clamp(min=_LEAST), shift


@torch.no_grad()
def fold(source: nn.Module, layers: list[nn.Module], factor: Tensor, shift: Tensor) -> None:
    """Make `source` give (x + shift) / factor and the layers that read it undo that, computed in float64.

    Behind an activation function only a shift of zero is undone.
    """
    weight, bias = _weight(source), source._parameters["bias"]
    weight.copy_(weight.double() / factor.view(-1, *[1] * (weight.dim() - 1)))
    if bias is not None:
        bias.copy_((bias.double() + shift) / factor)
    for layer in layers:
        weight, bias = _weight(layer), layer._parameters["bias"]
        if bool(shift.any()):
            assert bias is not None
            bias.copy_(bias.double() - weight.double() @ shift)
        weight.copy_(weight.double() * _by_input(layer, factor))


def largest_by_input(layer: nn.Module) -> Tensor:
    """Largest weight (C,) that reads each of a layer's input channels."""
    weight = _weight(layer).abs().flatten(2).amax(2) if _weight(layer).dim() > 2 else _weight(layer).abs()  # (O, I/g)
    return weight.view(_groups(layer), -1, weight.shape[1]).amax(1).flatten()


def _by_input(layer: nn.Module, factor: Tensor) -> Tensor:
    """A number for each input channel (C,), in the shape of the layer's weight (O, C/groups, ...)."""
    weight, groups = _weight(layer), _groups(layer)
    rows = factor.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, weight.shape[1])
    return rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, _ConvNd) else 1


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _quantizer(student: Chain, group: ChannelGroup) -> ActQuantizer:
    quantizer = student.find(group.quantizer)
    assert isinstance(quantizer, ActQuantizer)
    return quantizer


def _note(ends: list[Tensor], dim: int, x: Tensor) -> None:
    rows = x.detach().float().movedim(dim, -1).flatten(0, -2)  # (rows, C)
    ends.append(torch.stack([rows.amin(0), rows.amax(0)]))
