"""How much each channel of each unit's output matters to the network's output (diagonal Fisher information)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_ptq.graph.units import Chain
from lightning_ptq.losses.base import channels_first
from lightning_ptq.store import chunks

# Images of one backward pass, the only one through the whole network, and numbers of them: a small batch, since every
# activation is kept.
_BATCH, _BATCH_SIZE = 32, 2**23
# Smallest weight of a channel relative to the mean, so that no channel's error becomes free.
_FLOOR = 0.1


def channel_importance(
    teacher: Chain, images: Tensor, device: torch.device, gather: Callable[[Tensor], Iterable[Tensor]]
) -> list[Tensor]:
    """Weights of the channels in a unit's reconstruction loss, after BRECQ's Fisher weighting (Li et al. 2021).

    BRECQ takes the gradient of the loss, element by element; with a confident teacher that is next to zero for most
    images. These are the outputs' gradients, `channel_fisher`.

    Args:
        images: (N, C, H, W), this process's share.
        gather: tensor -> that tensor of every process.

    Returns:
        For each unit a tensor (channels,) with mean 1; for the last unit, the output itself, all ones.
    """
    return [_normalised(weights) for weights in channel_fisher(teacher, images, device, gather)]


def channel_fisher(
    teacher: Chain, images: Tensor, device: torch.device, gather: Callable[[Tensor], Iterable[Tensor]]
) -> list[Tensor]:
    """How much squared error of each channel of each unit's output makes at the network's output, to first order.

    Of channel c it is the squared gradient of the network's output with respect to the unit's, summed over outputs and
    averaged over images and positions. The sum over outputs is estimated with random signs, one vector for each image
    (Hutchinson), so it costs one backward pass. Arguments as `channel_importance`.

    Returns:
        For each unit a tensor (channels,).
    """
    generator = torch.Generator().manual_seed(0)
    means: list[Tensor] = []
    for x in chunks(images, _BATCH, _BATCH_SIZE):
        outputs: list[Tensor] = []
        with torch.enable_grad():
            z = x.to(device)
            for unit in teacher.units:
                z = unit(z)
                outputs.append(z if z.requires_grad else z.detach().requires_grad_())
                z = outputs[-1]
            signs = torch.randint(0, 2, z.shape, generator=generator).mul_(2).sub_(1).to(z)
            gradients = torch.autograd.grad(z, outputs, signs)
        share = len(x) / len(images)
        parts = [share * _per_channel(g, teacher.channel_dim(k, g.shape)) for k, g in enumerate(gradients)]
        means = parts if not means else [a + b for a, b in zip(means, parts, strict=True)]
    total = torch.stack(list(gather(torch.cat(means)))).mean(0)
    return list(total.split([len(part) for part in means]))


def _per_channel(gradient: Tensor, dim: int) -> Tensor:
    """Mean square of each channel (C,) over images and positions, where channels are at `dim`."""
    return channels_first(gradient.detach(), dim).float().square().transpose(0, 1).flatten(1).mean(1)


def _normalised(weights: Tensor) -> Tensor:
    mean = weights.mean()
    if not bool(torch.isfinite(mean)) or float(mean) == 0.0:
        return torch.ones_like(weights)
    weights = (weights / mean).clamp(min=_FLOOR)
    return weights / weights.mean()
