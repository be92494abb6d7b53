"""Quantizers on numbers of any kind and size, against float64 and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ptq import functional as F
from lightning_ptq.quantizers import ActQuantizer, LogQuantizer
from lightning_ptq.ranges import Histogram, weight_qparams
from lightning_ptq.weights import ROUNDINGS, AdaRound, WeightQuantizer
from tests.strategies import MAGNITUDES, rows

pytestmark = pytest.mark.usefixtures("both_ways")

fast = settings(max_examples=50, deadline=None, derandomize=True)
METHODS = st.sampled_from(["minmax", "mse", "percentile"])
WEIGHT_BITS = st.integers(2, 8)


def quantizer_of(x: Tensor, bits: int, symmetric: bool, method: str) -> ActQuantizer:
    seen, q = Histogram(), ActQuantizer(bits, symmetric)
    seen.update(x)
    q.start(seen, method)  # type: ignore[arg-type]
    return q


@given(rows(most=2), st.sampled_from([2, 4, 8, 16]), st.booleans(), METHODS)
@fast
def test_activations_keep_their_order_and_stay_within_half_a_step(
    x: Tensor, bits: int, symmetric: bool, method: str
) -> None:
    q = quantizer_of(x, bits, symmetric, method)
    x = torch.cat([x.flatten(), x.new_tensor([0.0, 1e30, -1e30])]).sort().values
    y, step = q(x), q.scale.detach().double()
    assert math.isfinite(float(step))
    assert float(step) > 0
    nearest = x.double().clamp(q.low * step, q.high * step)
    assert ((y.double() - nearest).abs() <= (0.5 + 2.0 ** (bits - 23)) * step).all()  # x / step is a float32
    assert (y.diff() >= 0).all()
    assert (y[x == 0] == 0).all(), "zeros, as padding has them, stay zeros"
    assert torch.equal(q(y), y)


@given(rows(most=2), st.sampled_from([2, 4, 8]), METHODS)
@fast
def test_half_precision_gets_finite_numbers_where_it_gave_them(x: Tensor, bits: int, method: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        limit = min(torch.finfo(dtype).max, 1e30)
        given_ = (x / x.abs().max().clamp(min=1e-30) * limit).clamp(-limit, limit).to(dtype)
        q = quantizer_of(given_, bits, False, method)
        y = q(given_)
        assert y.dtype == dtype
        assert y.isfinite().all()


@given(rows(most=1), st.sampled_from([2, 3, 4]), st.integers(0, 2**16))
@fast
def test_the_logarithmic_grid_is_searched_by_ratio(x: Tensor, bits: int, seed: int) -> None:
    x = x[0].abs()
    seen, q = Histogram(), LogQuantizer(bits)
    seen.update(x)
    q.start(seen, "mse")
    x = torch.cat([x, x.new_tensor([0.0, 1e-30])])
    top = float(q.scale.detach())
    for value, found in zip(x.tolist(), q(x).tolist(), strict=True):
        octaves = 2.0**bits if value == 0 else -math.log2(value / top)
        k = min(max(octaves, 0.0), 2.0**bits - 1)
        assert found > 0
        assert abs(math.log2(top / found) - k) <= 0.5 + 1e-4


def weight_quantizer(
    rounding: str, x: Tensor, bits: int, symmetric: bool, method: str, channels: bool
) -> WeightQuantizer:
    q = ROUNDINGS[rounding](x.shape, bits, per_channel=channels, symmetric=symmetric)
    q.set_range(x, *weight_qparams(x, method, bits, symmetric, channels))  # type: ignore[arg-type]
    return q


@given(rows(), WEIGHT_BITS, st.booleans(), METHODS, st.booleans())
@fast
def test_every_rounding_starts_at_the_nearest_point_of_the_grid(
    x: Tensor, bits: int, symmetric: bool, method: str, channels: bool
) -> None:
    """Weights in rows of any kind, zeros and one element included, against float64."""
    for rounding in ROUNDINGS:
        q = weight_quantizer(rounding, x, bits, symmetric, method, channels)
        step, zero = q.scale.double(), q.zero_point.double()
        nearest = x.double().clamp((q.qmin - zero) * step, (q.qmax - zero) * step)
        assert ((q(x).double() - nearest).abs() <= 0.5001 * step).all()
        assert torch.equal(q.integers(x), q.integers(x, nearest=True))
        assert q.flipped(x) == 0
        assert torch.equal(q.integers(q(x), nearest=True), q.integers(x)), "on its grid a weight stays"


@given(rows(), WEIGHT_BITS, st.booleans(), METHODS, st.booleans(), st.integers(0, 2**16))
@fast
def test_learned_roundings_stay_on_the_grid_with_finite_gradients(
    x: Tensor, bits: int, symmetric: bool, method: str, channels: bool, seed: int
) -> None:
    for rounding in ("adaround", "flexround"):
        q = weight_quantizer(rounding, x, bits, symmetric, method, channels)
        generator = torch.Generator().manual_seed(seed)
        for parameter in q.roundings:
            parameter.requires_grad_()
            parameter.data += torch.randn(parameter.shape, generator=generator)
        soft = q(x)
        (soft / q.scale).sum().backward()
        assert soft.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in q.roundings)
        integers = q.integers(x)
        assert ((integers >= q.qmin) & (integers <= q.qmax) & (integers == integers.round())).all()
        if isinstance(q, AdaRound):
            # Down or up: never further than a step from the clamped weight, in float64.
            step, zero = q.scale.double(), q.zero_point.double()
            position = (x.double() / step).clamp(q.qmin - zero, q.qmax - zero) + zero
            assert ((integers.double() - position).abs() <= 1 + 1e-4 + position.abs() * 1e-6).all()
            q.reopen(x)
            assert q.alpha.isfinite().all()
            assert torch.equal(q.integers(x), integers), "opened again, a rounding is what it was"


@given(MAGNITUDES, WEIGHT_BITS, st.integers(0, 2**16), st.floats(-1, 1))
@fast
def test_gains_and_shifts_change_no_integer(magnitude: float, bits: int, seed: int, gain: float) -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)) * magnitude
    q = weight_quantizer("nearest", x, bits, False, "mse", True)
    before, plain = q.integers(x), q(x)
    q.log_gain.data.fill_(gain)
    q.bias_shift.data.fill_(0.5)
    assert torch.equal(q.integers(x), before)
    torch.testing.assert_close(q(x).double(), plain.double() * math.exp(gain), rtol=1e-5, atol=1e-37)
    assert q.correct(None).tolist() == [0.5] * 3


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile"])
def test_one_element_is_kept(method: str) -> None:
    for value in (3.0, -2e20, 1e-5, 0.0):
        x = torch.tensor([value])
        for bits in (2, 8):
            q = quantizer_of(x, bits, False, method)
            torch.testing.assert_close(q(x), x, rtol=0.01, atol=0)
            w = weight_quantizer("adaround", x[None], bits, False, method, True)
            torch.testing.assert_close(w(x[None]), x[None], rtol=1e-4, atol=0)
    assert F.MIN_SCALE < 1e-5
