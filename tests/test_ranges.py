"""Range estimators against exhaustive search on the raw values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ptq.errors import PTQError
from lightning_ptq.functional import integer_range, qparams, quantize
from lightning_ptq.ranges import Histogram, search_mse, weight_qparams


def error_of(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, symmetric: bool) -> float:
    q = quantize(x.double(), scale.double(), zero.double(), *integer_range(bits, symmetric))
    return float(((q - zero) * scale - x.double()).square().mean())


def grid_search(x: torch.Tensor, bits: int, symmetric: bool) -> float:
    """Lowest error over 100 scales and every zero point, the search of the QDrop authors for p = 2."""
    qmin, qmax = integer_range(bits, symmetric)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    span = 2 * max(-low, high) if symmetric else high - low
    zeros = [0] if symmetric else range(qmin, qmax + 1)
    return min(
        error_of(x, torch.tensor(span * i / 100 / (qmax - qmin)), torch.tensor(float(z)), bits, symmetric)
        for i in range(1, 101)
        for z in zeros
    )


def samples(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20_000, generator=generator)
    return {"relu": x.relu(), "normal": x, "heavy": x**3, "negative": -x.abs(), "silu": torch.nn.functional.silu(x)}[
        kind
    ]


@pytest.mark.parametrize("kind", ["relu", "normal", "heavy", "negative", "silu"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (4, False), (2, True), (4, True)])
def test_histogram_search_is_as_good_as_the_grid_on_raw_values(kind: str, bits: int, symmetric: bool) -> None:
    x = samples(kind)
    histogram = Histogram()
    for part in x.chunk(7):
        histogram.update(part)
    scale, zero = histogram.qparams("mse", bits, symmetric)
    assert error_of(x, scale, zero, bits, symmetric) <= grid_search(x, bits, symmetric) * 1.001


@pytest.mark.parametrize("bits", [2, 4])
def test_weight_search_is_as_good_as_the_grid_in_every_channel(bits: int) -> None:
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    scale, zero = weight_qparams(weight, "mse", bits, False, True)
    ours = [error_of(weight[c], scale[c], zero[c], bits, False) for c in range(5)]
    grid = [grid_search(weight[c], bits, False) for c in range(5)]
    assert sum(ours) <= sum(grid) * 1.001


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.integers(1, 6),
    st.sampled_from([1e-20, 1.0, 1e20]),
)
@settings(max_examples=60, deadline=None)
def test_histogram_holds_everything_whatever_the_batches(values: list[float], parts: int, size: float) -> None:
    x = torch.tensor(values) * size
    whole, pieces = Histogram(), Histogram()
    whole.update(x)
    for part in x.chunk(parts):
        pieces.update(part)
    for histogram in (whole, pieces):
        assert histogram.counts.sum() == len(values)
        assert (histogram.low, histogram.high) == (float(x.min()), float(x.max()))
    used = pieces.centers()[pieces.counts > 0]
    assert used.min() - pieces.width <= x.min().double()
    assert used.max() + pieces.width >= x.max().double()


def test_histograms_of_two_processes_add_up_to_that_of_one() -> None:
    x = samples("heavy")
    both = Histogram()
    both.update(x)
    left, right = Histogram(), Histogram()
    left.update(x[:700])
    right.update(x[700:])
    merged = Histogram()
    for part in (left, right):
        merged.merge(Histogram.from_state(part.state()))
    assert merged.counts.sum() == both.counts.sum() == len(x)
    for method in ("minmax", "mse", "percentile"):
        ours, theirs = merged.qparams(method, 4, False), both.qparams(method, 4, False)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0.01, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_minmax_is_the_range_of_the_values(symmetric: bool) -> None:
    x = samples("silu")
    histogram = Histogram()
    histogram.update(x)
    expected = qparams(x.min(), x.max(), 4, symmetric)
    for ours, theirs in zip(histogram.qparams("minmax", 4, symmetric), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_percentile_clips_an_outlier_and_little_else() -> None:
    x = torch.cat([samples("normal"), torch.tensor([1e3])])
    histogram = Histogram()
    histogram.update(x)
    scale, zero = histogram.qparams("percentile", 8, False)
    high = float((255 - zero) * scale)
    exact = float(x.kthvalue(int(len(x) * 0.99995)).values)
    assert exact - 1 <= high <= exact + 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(PTQError, match="NaN or infinite"):
        Histogram().update(torch.tensor([0.0, bad]))


def test_least_squares_never_raises_the_error() -> None:
    rows = torch.randn(8, 100)
    counts = torch.randint(0, 5, (8, 100)).float()
    scale, zero = search_mse(rows, counts, 3, False)
    base, center = qparams(rows.amin(1), rows.amax(1), 3, False)

    def error(s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        q = quantize(rows, s[:, None], z[:, None], 0, 7)
        return (((q - z[:, None]) * s[:, None] - rows) ** 2 * counts).sum(1)

    assert (error(scale, zero) <= error(base, center) + 1e-4).all()
