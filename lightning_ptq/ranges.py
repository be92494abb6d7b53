"""Range estimators: from what a tensor holds to the scale and zero point of its quantizer.

Activations are seen once, batch by batch, and kept only as a histogram, so the search costs the same for a thousand
images as for one. Weights are small and searched on their own values. Both end in the same search over weighted
samples: rows of values (R, B) with counts (R, B).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor

from lightning_ptq.config import RangeName
from lightning_ptq.errors import PTQError
from lightning_ptq.functional import MIN_SCALE, binade, integer_range, qparams

# Two-sided mass that the percentile estimator clips.
PERCENTILE = 0.9999
_BINS = 4096
# Candidate scales of the search as fractions of the min-max scale. Geometric: low-bit optima of heavy-tailed tensors
# lie at a few hundredths of it, those of 8 bits near 1.
_FRACTIONS = torch.logspace(-2, 0.25, 48, base=10.0)
_FINE_FRACTIONS = torch.linspace(0.9, 1.1, 41)
_LEAST_SQUARES_STEPS = 4
# Elements of a weight that are searched together on a CPU.
_CACHED = 2**19
# Numbers that are counted at once: counts are float32, of which a larger one stays where it is when 1 is added.
_EXACT = 2**24
# Beyond 8 bits clipping never pays: the rounding error is too small for any tail to be traded for it.
_MAX_SEARCH_BITS = 8


@contextmanager
def _in_any_order() -> Iterator[None]:
    """Inside, a GPU may add up in any order: whole numbers come to the same, but torch asks for a fixed one."""
    asked, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warns)


class Histogram:
    """Running histogram of everything it is given, over a range that grows by doubling its bin width.

    Bins are [i * width, (i + 1) * width) for `_BINS` consecutive integers i, and the width is a power of two. Growing
    therefore merges whole bins, no count is ever split, and the histograms of several processes add up exactly.
    """

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self.width, self.first = 0.0, 0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add the elements of `x` (any shape).

        Raises:
            PTQError: `x` is empty, or holds NaN or infinity.
        """
        x = x.detach().float()
        if not x.numel():
            raise PTQError(f"no values (shape {tuple(x.shape)})")
        low, high = (float(v) for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise PTQError("NaN or infinite values")
        self._cover(low, high)
        start = self.first * self.width
        x = torch.atleast_1d(x)
        for rows in x.split(max(1, _EXACT // max(x[0].numel(), 1))):
            for part in rows.reshape(-1).split(_EXACT):
                with _in_any_order():
                    counts = torch.histc(part, _BINS, start, start + _BINS * self.width)
                self.counts += counts.cpu().double()

    def merge(self, other: Histogram) -> None:
        """Add what `other` has seen."""
        if other.width:
            self._cover(other.low, other.high, other.width)
            other._cover(self.low, self.high, self.width)
            other._move(self.width, self.first)
            self.counts += other.counts

    def _cover(self, low: float, high: float, width: float = 0.0) -> None:
        """Extend the seen range by [low, high] and widen the bins (to `width` at least) until they hold it."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not self.width:
            self.width = 2.0 ** math.floor(math.log2(max(self.high, -self.low, MIN_SCALE) / _BINS))
        new_width, first = max(self.width, width), self.first
        while not (first * new_width <= self.low and self.high < (first + _BINS) * new_width):
            # Zero-based if the data are one-sided, else centred on them; wider where that does not fit yet.
            middle = 0 if self.low >= 0 else math.floor((self.low + self.high) / 2 / new_width) - _BINS // 2
            new_width, first = (new_width, middle) if middle != first else (new_width * 2, self.first)
        self._move(new_width, first)

    def _move(self, width: float, first: int) -> None:
        """Re-bin to bins of `width` (a power of two times the present one) that start at `first`."""
        if (width, first) != (self.width, self.first):
            used = self.counts > 0
            # In float64 and through the bins' lower ends, which powers of two keep exact at any ratio of widths.
            index = (torch.arange(_BINS) + self.first).double() * self.width
            index = (index / width).floor().long() - first
            self.counts = torch.zeros_like(self.counts).index_add_(0, index[used], self.counts[used])
            self.width, self.first = width, first

    def centers(self) -> Tensor:
        """Mid-points of the bins, float64 (_BINS,)."""
        return (torch.arange(_BINS, dtype=torch.float64) + (self.first + 0.5)) * self.width

    def state(self) -> Tensor:
        """Everything as one float64 tensor, for exchange between processes."""
        head = torch.tensor([self.low, self.high, self.width, float(self.first)], dtype=torch.float64)
        return torch.cat([head, self.counts])

    @classmethod
    def from_state(cls, state: Tensor) -> Histogram:
        """The histogram that `state()` described."""
        histogram = cls()
        histogram.low, histogram.high, histogram.width = (float(v) for v in state[:3])
        histogram.first, histogram.counts = int(state[3]), state[4:].cpu().clone()
        return histogram

    def qparams(self, method: RangeName, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero point, both shape (), by the estimator called `method`."""
        low, high = torch.tensor([self.low]), torch.tensor([self.high])
        if method == "percentile":
            cumulative = self.counts.cumsum(0) / self.counts.sum()
            tail = (1 - PERCENTILE) / 2
            inside = (cumulative > tail) & (cumulative - self.counts / self.counts.sum() < 1 - tail)
            kept = self.centers()[inside].float()
            low, high = low.clamp(min=kept[:1] - self.width), high.clamp(max=kept[-1:] + self.width)
        if method == "mse" and bits <= _MAX_SEARCH_BITS:
            used = self.counts > 0
            # Bins at the ends are wider than the data in them.
            values = self.centers()[used].clamp(self.low, self.high)
            scale, zero_point = search_mse(values[None], self.counts[used][None], bits, symmetric, skewed=True)
        else:
            scale, zero_point = qparams(low, high, bits, symmetric)
        return scale[0], zero_point[0]


def weight_qparams(
    weight: Tensor, method: RangeName, bits: int, symmetric: bool, per_channel: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight (O, ...): both (O,) per channel, (1,) per tensor.

    Raises:
        PTQError: the weight is empty, or holds NaN or infinity.
    """
    if not weight.numel():
        raise PTQError(f"its weight has no values (shape {tuple(weight.shape)})")
    if not weight.isfinite().all():
        raise PTQError("its weight holds NaN or infinite values")
    rows = weight.detach().float().reshape(weight.shape[0] if per_channel else 1, -1)
    if method == "mse":
        # Rows have nothing to do with one another; a few at a time stay in the CPU's cache, which is five times faster.
        parts = rows.split(max(1, _CACHED // rows.shape[1]) if rows.device.type == "cpu" else len(rows))
        found = [search_mse(part, torch.ones_like(part), bits, symmetric) for part in parts]
        return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])
    low, high = torch.aminmax(rows, dim=1)
    if method == "percentile":
        # kthvalue, not quantile: the latter refuses more than 2**24 elements.
        tail = int(rows.shape[1] * (1 - PERCENTILE) / 2)
        low = rows.kthvalue(tail + 1, dim=1).values
        high = rows.kthvalue(rows.shape[1] - tail, dim=1).values
    return qparams(low, high, bits, symmetric)


def search_mse(
    values: Tensor, counts: Tensor, bits: int, symmetric: bool, skewed: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that minimise sum(counts * (fake_quantize(values) - values)**2) of every row.

    A geometric grid of scales for each plausible zero point, a finer one around the best, then least-squares steps:
    with the integers fixed the best scale has a closed form, so each step can only lower the error.

    Args:
        values, counts: (R, B).
        skewed: one end of the one row may be far out alone: zero points that clip only there are plausible, too.

    Returns:
        (scale, zero_point), float32 (R,).
    """
    qmin, qmax = integer_range(bits, symmetric)
    low, high = values.amin(1), values.amax(1)
    unit = binade(torch.maximum(-low, high))  # (R,): no square overflows, and no bit of the result changes
    values, low, high = values / unit[:, None], low / unit, high / unit
    base, center = qparams(low, high, bits, symmetric)  # (R,)
    best_error = torch.full_like(base, float("inf"))
    best_scale, best_zero = base.clone(), center.clone()
    one_sided = bool((low >= 0).all()) or bool((high <= 0).all())
    for shift in (0,) if symmetric or one_sided else (0, -1, 1, -2, 2):
        zero = (center + shift).clamp(qmin, qmax)  # (R,)
        for fraction in _FRACTIONS.tolist():
            scale = base * fraction
            best_error, best_scale, best_zero = _keep_better(
                values, counts, scale, zero, qmin, qmax, best_error, best_scale, best_zero
            )
    if skewed and not (symmetric or one_sided):
        # Zero points with which one end is just not clipped, or clipped to a part of it, whatever the other is.
        scales = base * _FRACTIONS  # (F,) of the one row
        for (end, at), part in product(((low, qmin), (high, qmax)), (1.0, 0.75, 0.5)):
            zeros = (at - part * end / scales).round().clamp(qmin, qmax)
            k = _integers(values, scales, zeros, qmin, qmax)  # (F, B)
            best = ((k * scales[:, None] - values).square() * counts).sum(1).argmin().view(1)
            best_error, best_scale, best_zero = _keep_better(
                values, counts, scales[best], zeros[best], qmin, qmax, best_error, best_scale, best_zero
            )
    coarse = best_scale
    for fraction in _FINE_FRACTIONS.tolist():
        best_error, best_scale, best_zero = _keep_better(
            values, counts, coarse * fraction, best_zero, qmin, qmax, best_error, best_scale, best_zero
        )
    for _ in range(_LEAST_SQUARES_STEPS):
        k = _integers(values, best_scale, best_zero, qmin, qmax)
        weighted = counts * k
        denominator = (weighted * k).sum(1)
        scale = torch.where(denominator > 0, (weighted * values).sum(1) / denominator.clamp(min=1e-30), best_scale)
        best_error, best_scale, best_zero = _keep_better(
            values, counts, scale.to(base.dtype), best_zero, qmin, qmax, best_error, best_scale, best_zero
        )
    return (best_scale * unit).float().clamp(min=MIN_SCALE), best_zero.float()


def _integers(values: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> Tensor:
    """Integers relative to the zero point, (R, B)."""
    return torch.clamp(torch.round(values / scale[:, None]), (qmin - zero)[:, None], (qmax - zero)[:, None])


def _keep_better(
    values: Tensor,
    counts: Tensor,
    scale: Tensor,
    zero: Tensor,
    qmin: int,
    qmax: int,
    best_error: Tensor,
    best_scale: Tensor,
    best_zero: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row, the candidate (scale, zero) where its squared error is lower, else the best so far."""
    k = _integers(values, scale, zero, qmin, qmax)
    error = (k.mul_(scale[:, None]).sub_(values).square_().mul_(counts)).sum(1).to(best_error.dtype)
    better = error < best_error
    return (
        torch.where(better, error, best_error),
        torch.where(better, scale, best_scale),
        torch.where(better, zero, best_zero),
    )
