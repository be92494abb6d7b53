"""Rows of all processes, for losses that compare images with each other. With one process these do nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """How many processes calibrate together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def first_row(rows: int) -> int:
    """How many rows the processes before this one hold, `rows` being this one's."""
    return sum(_counts(rows)[: rank()])


def rows_of_all(x: Tensor) -> Tensor:
    """`x` (B, ...) of every process, equally many rows each, one after another: (processes * B, ...).

    Differentiable: every process's loss reaches the rows of every process.
    """
    if processes() == 1:
        return x
    result: Tensor = _RowsOfAll.apply(x)
    return result


class _RowsOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(processes())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # others may read what came in
        dist.all_reduce(grad)
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather_rows(x: Tensor) -> Tensor:
    """`x` (n, ...) of every process, one after another; processes may hold different numbers of rows. No gradients."""
    if processes() == 1:
        return x
    counts = _counts(len(x))
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    parts = rows_of_all(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _counts(rows: int) -> list[int]:
    if processes() == 1:
        return [rows]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return rows_of_all(torch.tensor([rows], device=device)).tolist()
