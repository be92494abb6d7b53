"""Range estimators against exhaustive search on the raw values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ptq.errors import PTQError
from lightning_ptq.functional import MIN_SCALE, integer_range, qparams, quantize
from lightning_ptq.ranges import Histogram, search_mse, weight_qparams
from tests.strategies import rows


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
    far = torch.cat([x, torch.tensor([30.0])])
    return {
        "relu": x.relu(),
        "normal": x,
        "heavy": x**3,
        "negative": -x.abs(),
        "silu": torch.nn.functional.silu(x),
        "one far above": far,
        "one far below": -far,
    }[kind]


@pytest.mark.parametrize("kind", ["relu", "normal", "heavy", "negative", "silu", "one far above", "one far below"])
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


@pytest.mark.parametrize("shape", [(3, 2**23), (1, 2**24 + 5)])
def test_no_number_is_too_many_to_be_counted(shape: tuple[int, int]) -> None:
    """float32 does not count beyond 2^24, and so many zeros are in the first layers of 64 images of 224 pixels."""
    histogram = Histogram()
    histogram.update(torch.zeros(()).expand(shape))
    assert int(histogram.counts.max()) == shape[0] * shape[1]


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


# ---- any magnitude, any kind of row ----

GRIDS = st.sampled_from([(2, False), (3, False), (4, False), (8, False), (16, False), (2, True), (4, True), (8, True)])
fast = settings(max_examples=40, deadline=None, derandomize=True)


def check_covers(x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> None:
    """A usable grid that keeps each value of its range to half a step, in float64."""
    qmin, qmax = integer_range(bits, symmetric)
    assert scale.dtype == zero.dtype == torch.float32
    assert ((scale >= MIN_SCALE) & scale.isfinite()).all()
    assert ((zero == zero.round()) & (zero >= qmin) & (zero <= qmax)).all()
    s, z = scale.double()[:, None], zero.double()[:, None]
    y = (quantize(x.double(), s, z, qmin, qmax) - z) * s
    # A zero point is an integer, so that the range may end half a step before the data: the error is a step there.
    assert ((y - x.double()).abs() <= s * 1.0001).all()


@given(rows(), GRIDS)
@fast
def test_minmax_covers_every_row(x: Tensor, grid: tuple[int, bool]) -> None:
    scale, zero = weight_qparams(x, "minmax", *grid, per_channel=True)
    check_covers(x, scale, zero, *grid)


@given(rows(), GRIDS.filter(lambda grid: grid[0] <= 8), st.sampled_from(["mse", "percentile"]))
@fast
def test_the_search_never_does_worse_than_minmax(x: Tensor, grid: tuple[int, bool], method: str) -> None:
    plain = weight_qparams(x, "minmax", *grid, per_channel=True)
    found = weight_qparams(x, method, *grid, per_channel=True)
    for c in range(len(x)):
        unit = float(x[c].abs().max()) or 1.0
        ours, theirs = (error_of(x[c], s[c], z[c], *grid) / unit**2 for s, z in (found, plain))
        # Steps below MIN_SCALE are not to be had; what is that small is nothing to a network.
        assert ours <= theirs * 1.0001 + 1e-12 or float(plain[0][c]) < 4 * MIN_SCALE


@given(rows(), GRIDS.filter(lambda grid: grid[0] <= 8), st.integers(-12, 90))
@fast
def test_ranges_grow_with_the_weights_to_the_last_bit(x: Tensor, grid: tuple[int, bool], power: int) -> None:
    """A row that is larger by a power of two has a scale that is larger by it, and the same zero point."""
    x = x / (x.abs().amax(1, keepdim=True) + 1e-30)
    small, large = (weight_qparams(w, "mse", *grid, per_channel=True) for w in (x, x.double().mul(2.0**power).float()))
    usable = (small[0] > MIN_SCALE) & (large[0] > MIN_SCALE)
    assert torch.equal(large[0][usable].double(), small[0][usable].double() * 2.0**power)
    assert torch.equal(large[1][usable], small[1][usable])


@given(rows(), GRIDS.filter(lambda grid: grid[0] <= 8))
@fast
def test_a_channel_is_searched_as_if_it_were_alone(x: Tensor, grid: tuple[int, bool]) -> None:
    together = weight_qparams(x, "mse", *grid, per_channel=True)
    for c in range(len(x)):
        alone = weight_qparams(x[c : c + 1], "mse", *grid, per_channel=True)
        unit = float(x[c].abs().max()) or 1.0
        ours, theirs = (error_of(x[c], s, z, *grid) / unit**2 for s, z in ((together[0][c], together[1][c]), alone))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-12)


@given(st.lists(rows(most=1), min_size=1, max_size=4), st.lists(rows(most=1), min_size=1, max_size=4))
@fast
def test_merged_histograms_hold_each_value_in_its_bin(left: list[Tensor], right: list[Tensor]) -> None:
    """Sorted data against sorted bins, in float64: no value lies further than its bin's half width from its middle."""
    parts = []
    for batches in (left, right):
        parts.append(Histogram())
        for batch in batches:
            parts[-1].update(batch)
    merged = Histogram()
    for part in parts:
        merged.merge(Histogram.from_state(part.state()))
    values = torch.cat([x.flatten() for x in (*left, *right)]).double().sort().values
    assert (merged.low, merged.high) == (float(values[0]), float(values[-1]))
    middles = merged.centers().repeat_interleave(merged.counts.long())
    assert len(middles) == len(values)
    assert ((middles - values).abs() <= 0.502 * merged.width).all()


@given(rows(), GRIDS, st.sampled_from(["minmax", "mse", "percentile"]))
@fast
def test_a_histogram_gives_a_usable_grid_whatever_it_saw(x: Tensor, grid: tuple[int, bool], method: str) -> None:
    histogram = Histogram()
    for batch in x:
        histogram.update(batch)
    scale, zero = (v[None] for v in histogram.qparams(method, *grid))
    if method == "minmax":
        check_covers(x.view(1, -1), scale, zero, *grid)
    assert ((scale >= MIN_SCALE) & scale.isfinite() & zero.isfinite()).all()
    plain = qparams(x.min(), x.max(), *grid)
    unit = float(x.abs().max()) or 1.0
    if method == "mse":
        ours, theirs = (error_of(x, s, z, *grid) / unit**2 for s, z in ((scale, zero), plain))
        # Bins, of which 4096 hold the range, stand for their middle.
        assert ours <= theirs * 1.01 + 1e-7 or float(plain[0]) < 4 * MIN_SCALE


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["minmax", "mse", "percentile"])
def test_weights_that_are_not_finite_are_refused(bad: float, method: str) -> None:
    with pytest.raises(PTQError, match="NaN or infinite"):
        weight_qparams(torch.tensor([[1.0, bad], [0.5, 2.0]]), method, 4, False, True)


def test_nothing_has_no_range() -> None:
    with pytest.raises(PTQError, match=r"no values \(shape \(0, 3\)\)"):
        Histogram().update(torch.empty(0, 3))
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(PTQError, match=r"no values"):
            weight_qparams(torch.empty(shape), "mse", 4, False, True)
