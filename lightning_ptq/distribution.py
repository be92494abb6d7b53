"""PD-Quant's distribution correction: calibration activations, moved towards what the training images gave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lightning_ptq.graph.fold import Statistics, statistics_of
from lightning_ptq.store import chunks, widened

# Images that are corrected together; each is corrected by itself.
_BATCH = 32
# Adam moves a value by about its rate at each step: together as far as PD-Quant's 500 steps of 1e-3 go, but in units of
# the activation's standard deviation. And what the squared way back weighs.
_REACH, _STAY = 0.5, 50.0


def correct_distribution(
    unit: nn.Module,
    x: Tensor,
    device: torch.device,
    steps: int,
    like: Callable[[Tensor], Tensor] = torch.empty_like,
) -> Tensor:
    """The float unit's input `x` (N, ...), moved so that each image's activations come closer to what training gave.

    Batch norm holds mean and deviation of what it saw in training; what a few calibration images do in a unit differs
    from that, the more so the fewer there are. The loss of an image is the squared distance of its activations' mean
    and deviation over positions to those, summed over channels and layers, and its squared way from where it was
    (Liu et al. 2023, eq. 9, whose distances are absolute; here they are in units of the deviations).

    Args:
        unit: of the teacher, with batch norm folded.
        steps: of the optimisation, for each batch of images.
        like: makes the tensor for the result.

    Returns:
        A tensor like `x`, which is `x` itself if no batch norm was folded into a layer of the unit.
    """
    layers = [(m, statistics_of(m)) for m in unit.modules()]
    known = [(m, (s[0].to(device), s[1].to(device))) for m, s in layers if s is not None]
    if not known:
        return x
    deviation = _deviation(x).clamp(min=1e-8).to(device)
    result, start = like(x), 0
    for some in chunks(x, _BATCH):
        result[start : start + len(some)] = _corrected(unit, widened(some.to(device)), deviation, known, steps)
        start += len(some)
    return result


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of all of `x` (N, ...), whose parts pass one by one."""
    moments = [torch.stack([some.double().sum(), some.double().square().sum()]) for some in chunks(x)]
    mean, square = (torch.stack(moments).sum(0) / x.numel()).cpu().unbind()
    return (square - mean.square()).clamp(min=0.0).sqrt().float()


@torch.enable_grad()
def _corrected(
    unit: nn.Module, x: Tensor, deviation: Tensor, layers: list[tuple[nn.Module, Statistics]], steps: int
) -> Tensor:
    moved = x.clone().requires_grad_(True)
    adam = torch.optim.Adam([moved], lr=float(deviation) * _REACH / steps)
    distances: list[Tensor] = []
    hooks = [m.register_forward_hook(partial(_measure, statistics, distances)) for m, statistics in layers]
    try:
        for _ in range(steps):
            distances.clear()
            unit(moved)
            way = ((moved - x) / deviation).square().sum(1).mean()
            loss = torch.stack([*distances, _STAY * way]).sum()
            (moved.grad,) = torch.autograd.grad(loss, moved)
            adam.step()
    finally:
        for hook in hooks:
            hook.remove()
    return moved.detach()


def _measure(statistics: Statistics, distances: list[Tensor], _: nn.Module, __: object, out: Tensor) -> None:
    """Append the distance of a layer's output (B, C, positions...), which is that of its batch norm."""
    if out.dim() < 3 or out[0, 0].numel() < 2:
        return
    mean, deviation = statistics
    flat = out.float().flatten(2)
    distance = ((flat.mean(2) - mean) / deviation).square() + (flat.std(2) / deviation - 1.0).square()
    distances.append(distance.sum(1).mean())
