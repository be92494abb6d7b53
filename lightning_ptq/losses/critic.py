"""What contrastive calibration compares: features of activations, their similarity, and which pairs are negatives."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, normalize

from lightning_ptq.functional import binade

FeatureMap = Literal["tail", "tail-features", "output", "projection", "positions"]
Similarity = Literal["cosine", "gaussian"]
Collisions = Literal["argmax", "similarity", "keep"]

# The fixed random projection: positions are averaged down to a grid of this side, and this many numbers come out.
GRID, PROJECTED = 4, 128
# Deviations that nothing is further away than: squares of them are numbers still.
_FAR = 1e15


def pooled(x: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C): mean over positions."""
    return x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x


def at_positions(x: Tensor) -> Tensor:
    """(B, C, ...) -> (B * positions, C): every position of every image is a row, those of one image together."""
    return x.flatten(2).transpose(1, 2).flatten(0, 1) if x.dim() > 2 else x


def projected(x: Tensor) -> Tensor:
    """(B, C, ...) -> (B, PROJECTED): a fixed random projection of x averaged down to a coarse grid of positions.

    It keeps distances up to a factor near 1 (Johnson and Lindenstrauss 1984), and where things are, which a mean loses.
    """
    if x.dim() == 4:
        x = adaptive_avg_pool2d(x, (min(GRID, x.shape[2]), min(GRID, x.shape[3])))
    elif x.dim() == 3:
        x = adaptive_avg_pool1d(x, min(GRID**2, x.shape[2]))
    x = x.flatten(1)
    result: Tensor = x @ _projection(x.shape[1], x.device)
    return result


@lru_cache(maxsize=4)
def _projection(size: int, device: torch.device) -> Tensor:
    """(size, PROJECTED): the same numbers in every process and every run."""
    numbers = torch.randn(size, PROJECTED, generator=torch.Generator().manual_seed(size)) / math.sqrt(PROJECTED)
    return numbers.to(device)


def directions(x: Tensor) -> Tensor:
    """The rows of `x` (N, D) at length 1, float32; rows of zeros stay as they are."""
    x = x.float()
    return normalize(x / binade(x.detach().abs().amax(1, keepdim=True)), dim=1)


def cosine(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cosine similarity of every student feature to every teacher feature, over the temperature.

    Shapes: (B, D) and (N, D) -> (B, N).
    """
    return directions(student) @ directions(teacher).T / temperature


def gaussian(student: Tensor, teacher: Tensor, temperature: float, deviation: Tensor) -> Tensor:
    """-|s - t|^2 / (2 deviation^2) over the temperature, for every student feature s and every teacher feature t.

    With the root mean square distance of the teacher's features to their mean as deviation (), two images are -1 apart
    on average before the temperature divides; 0, where all look alike, counts as 1.

    Shapes: (B, D) and (N, D) -> (B, N).
    """
    student, teacher = student.float(), teacher.float()
    # Squares are expanded: pairwise differences would need B x N x D numbers. Centred, so that little cancels.
    mean, deviation = teacher.mean(0), torch.where(deviation > 0, deviation, 1.0)
    student, teacher = (((x - mean) / deviation).clamp(-_FAR, _FAR) for x in (student, teacher))
    squares = student.square().sum(1)[:, None] + teacher.square().sum(1) - 2.0 * student @ teacher.T
    return -squares.clamp(0.0, _FAR) / (2.0 * temperature)


def find_negatives(
    own: Tensor, teacher: Tensor, outputs: Tensor, collisions: Collisions = "argmax", share: float = 0.1
) -> Tensor:
    """Which columns are negatives of which row, (B, N) boolean; a row's own column is none. No labels are needed.

    Args:
        own: (B,) column of every row's own image.
        teacher: (N, D) the teacher's features, which "similarity" compares: the `share` of columns that is most similar
            to the row's own is left out.
        outputs: (N, classes) the teacher's final outputs: "argmax" leaves out columns whose class is the row's own.
        collisions: what to do about images that are no negatives though they are others; "keep" lets them be.
    """
    columns = torch.arange(len(teacher), device=teacher.device)
    negatives = own[:, None] != columns
    if collisions == "argmax":
        classes = outputs.argmax(1)
        negatives = negatives & (classes[own][:, None] != classes)
    elif collisions == "similarity":
        near = cosine(teacher[own] - teacher.mean(0), teacher - teacher.mean(0), 1.0)
        count = 1 + round(share * (len(columns) - 1))  # its own column is the nearest
        negatives = negatives.scatter(1, near.topk(count, dim=1).indices, False)
    return negatives
