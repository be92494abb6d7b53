"""Inputs that property tests draw: rows of numbers of every kind and size."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = ("normal", "positive", "negative", "zeros", "constant", "sparse", "heavy", "far")
# Sizes that a network's numbers may have, and far beyond.
MAGNITUDES = st.integers(-30, 30).map(lambda power: 10.0**power)


def row(kind: str, length: int, magnitude: float, seed: int) -> Tensor:
    """float32 (length,) of one kind; the largest absolute value is about `magnitude` unless all are 0."""
    x = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = {
        "normal": x,
        "positive": x.abs(),
        "negative": -x.abs(),
        "zeros": torch.zeros_like(x),
        "constant": x[:1].expand(length),
        "sparse": x.where(torch.arange(length) % 5 == 0, 0.0),
        "heavy": x**7,
        "far": 1000.0 + x,
    }[kind]
    largest = float(x.abs().max()) or 1.0
    return (x / largest * magnitude).float()


@st.composite
def rows(draw: st.DrawFn, most: int = 5, longest: int = 40) -> Tensor:
    """float32 (R, B) of rows of different kinds and magnitudes."""
    length = draw(st.integers(1, longest))
    kinds = draw(st.lists(st.tuples(st.sampled_from(KINDS), MAGNITUDES), min_size=1, max_size=most))
    seed = draw(st.integers(0, 2**16))
    return torch.stack([row(kind, length, magnitude, seed + i) for i, (kind, magnitude) in enumerate(kinds)])
