"""Numerics against brute force over the integer grid and autograd's own derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ptq import functional as F
from lightning_ptq import soft_rounding as S
from tests.strategies import MAGNITUDES, rows

pytestmark = pytest.mark.usefixtures("both_ways")


def brute_force(x: float, scale: float, zero_point: int, qmin: int, qmax: int) -> float:
    """Nearest representable value by trying all of them."""
    grid = [(q - zero_point) * scale for q in range(qmin, qmax + 1)]
    return min(grid, key=lambda v: abs(v - x))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_fake_quantize_gives_the_nearest_grid_point(bits: int, symmetric: bool) -> None:
    qmin, qmax = F.integer_range(bits, symmetric)
    scale, zero = F.qparams(torch.tensor(-0.7), torch.tensor(1.9), bits, symmetric)
    x = torch.linspace(-2.013, 3.017, 211)
    y = F.fake_quantize(x, scale.log(), qmin - float(zero), qmax - float(zero))
    expected = [brute_force(v, float(scale), int(zero), qmin, qmax) for v in x.tolist()]
    torch.testing.assert_close(y, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_qparams_cover_the_range_and_hold_zero(bits: int, symmetric: bool) -> None:
    low, high = torch.tensor([-3.0, 0.5, -2.0, 0.0]), torch.tensor([1.0, 2.0, -1.0, 0.0])
    scale, zero = F.qparams(low, high, bits, symmetric)
    qmin, qmax = F.integer_range(bits, symmetric)
    assert ((scale > 0) & scale.isfinite()).all()
    assert ((zero >= qmin) & (zero <= qmax) & (zero == zero.round())).all()
    half = scale / 2 + 1e-6
    assert ((qmin - zero) * scale <= low.clamp(max=0) + half).all()
    assert ((qmax - zero) * scale >= high.clamp(min=0) - half).all()


def test_quantize_of_dequantize_is_the_identity() -> None:
    q = torch.arange(16.0)
    scale, zero = torch.tensor(0.37), torch.tensor(5.0)
    torch.testing.assert_close(F.quantize(F.dequantize(q, scale, zero), scale, zero, 0, 15), q)


@pytest.mark.parametrize("drop", [False, True])
def test_gradients_are_those_of_lsq(drop: bool) -> None:
    """The same function written with a straight-through round, differentiated by autograd in float64."""
    torch.manual_seed(0)
    x = torch.randn(64, dtype=torch.float64) * 2
    keep = (torch.rand(64) < 0.5).float() if drop else None
    low, high, log_scale = -1.0, 2.0, torch.tensor(-0.3, dtype=torch.float64)
    weight = torch.randn(64, dtype=torch.float64)

    xs, ls = x.clone().requires_grad_(), log_scale.clone().requires_grad_()
    position = xs / ls.exp()
    rounded = position + (position.round() - position).detach()
    inside = (position.round() >= low) & (position.round() <= high)
    y = torch.where(inside, rounded, position.detach().round().clamp(low, high)) * ls.exp()
    y = y if keep is None else torch.where(keep > 0, y, xs)
    (y * weight).sum().backward()

    xf, lf = x.float().requires_grad_(), log_scale.float().requires_grad_()
    (F.fake_quantize(xf, lf, low, high, keep) * weight.float()).sum().backward()
    torch.testing.assert_close(xf.grad, xs.grad.float())
    torch.testing.assert_close(lf.grad, ls.grad.float() * (64 * 2) ** -0.5, atol=1e-5, rtol=1e-5)


def test_half_precision_input_is_computed_in_float32() -> None:
    x = torch.full((4,), 200.4)
    y = F.fake_quantize(x.bfloat16(), torch.tensor(0.0), 0.0, 255.0)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.bfloat16().float().round())


def test_rectified_sigmoid_is_inverted() -> None:
    h = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    torch.testing.assert_close(S.rectified_sigmoid(S.inverse_rectified_sigmoid(h)), h)
    assert S.rectified_sigmoid(torch.tensor([-50.0, 50.0])).tolist() == [0.0, 1.0]


def test_the_regulariser_has_the_value_and_gradient_of_its_formula() -> None:
    h = torch.linspace(0.01, 0.99, 12, dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[0.3, 0.8]], dtype=torch.float64, requires_grad=True)
    for beta in (2.0, 3.7, 20.0):
        assert torch.autograd.gradcheck(lambda *hs, b=beta: S.undecided(hs, b), (h, other))
        formula = sum(1 - abs(2 * v - 1) ** beta for v in [*h.tolist(), *other.flatten().tolist()])
        assert float(S.undecided([h.detach(), other.detach()], beta)) == pytest.approx(formula)


@pytest.mark.parametrize("gains", [(3, 1), (1, 1)])
def test_soft_rounding_has_the_values_and_gradients_of_its_formula(gains: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = torch.linspace(-4.0, 4.0, 15, dtype=torch.float64).view(3, 5).requires_grad_()
    low, step = (torch.randn(3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    log_gain = torch.randn(gains, dtype=torch.float64, generator=generator).requires_grad_()

    def both(alpha: Tensor, log_gain: Tensor) -> tuple[Tensor, Tensor]:
        return S.soft_round(alpha, low, step, log_gain)

    weight, h = both(alpha, log_gain)
    torch.testing.assert_close(h, (1.2 * alpha.sigmoid() - 0.1).clamp(0, 1))
    torch.testing.assert_close(weight, (low + step * h) * log_gain.exp())
    assert torch.autograd.gradcheck(both, (alpha, log_gain))
    # Either output alone.
    assert torch.autograd.gradcheck(lambda *args: both(*args)[0], (alpha, log_gain))
    assert torch.autograd.gradcheck(lambda a: both(a, log_gain)[1], (alpha,))


def test_decided_rounding_costs_nothing() -> None:
    assert float(S.undecided([S.rectified_sigmoid(torch.tensor([-20.0, 20.0]))], 2.0)) == 0.0
    assert float(S.undecided([S.rectified_sigmoid(torch.zeros(3))], 7.0)) == pytest.approx(3.0)


def test_dot_is_the_sum_of_products_in_any_layout() -> None:
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    last = torch.channels_last
    pairs = [(a, b), (a.to(memory_format=last), b.to(memory_format=last)), (a, b.to(memory_format=last))]
    pairs += [(a[:, ::2], b[:, ::2]), (a.to(memory_format=last)[..., 1:], b.to(memory_format=last)[..., 1:])]
    for x, y in pairs:
        torch.testing.assert_close(F.dot(x, y), (x * y).sum())


def test_fake_quantize_is_the_same_in_every_layout() -> None:
    x, grad, log_scale = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.tensor(-1.0, requires_grad=True)
    keep = torch.randint(0, 2, x.shape).float()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        copy = x.to(memory_format=layout, copy=True).requires_grad_()
        y = F.fake_quantize(copy, log_scale, -1.0, 2.0, keep.to(memory_format=layout))
        results.append((y, *torch.autograd.grad(y, [copy, log_scale], grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_in_another_layout_changes_nothing() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    grad, log_scale = torch.randn(2, 3, 4, 5), torch.tensor(-1.0, requires_grad=True)
    results = []
    for direction in (grad, grad.contiguous(memory_format=torch.channels_last), torch.ones(()).expand(x.shape) * grad):
        z = x.clone().requires_grad_(True)
        results.append(torch.autograd.grad(F.fake_quantize(z, log_scale, -2.0, 1.0), (z, log_scale), direction))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    assert results[0][0].stride() == x.stride()


# ---- any magnitude, any zero point ----

fast = settings(max_examples=60, deadline=None, derandomize=True)
BITS = st.sampled_from([2, 3, 4, 5, 8, 16])


@given(BITS, st.booleans(), MAGNITUDES, st.floats(0, 1), st.integers(0, 2**16))
@fast
def test_every_integer_survives_dequantize_and_quantize(
    bits: int, symmetric: bool, scale: float, where: float, seed: int
) -> None:
    qmin, qmax = F.integer_range(bits, symmetric)
    q = torch.randint(qmin, qmax + 1, (200,), generator=torch.Generator().manual_seed(seed)).float()
    q[:2] = torch.tensor([qmin, qmax])
    s, zero = torch.tensor(scale), torch.tensor(qmin + where * (qmax - qmin)).round()
    assert torch.equal(F.quantize(F.dequantize(q, s, zero), s, zero, qmin, qmax), q)


@given(rows(most=1), BITS, st.booleans())
@fast
def test_any_tensor_is_rounded_to_its_grid_in_order(x: Tensor, bits: int, symmetric: bool) -> None:
    """Against float64: half a step at most inside the grid, the grid's end outside, and no two values change places."""
    qmin, qmax = F.integer_range(bits, symmetric)
    scale, zero = F.qparams(x.min(), x.max(), bits, symmetric)
    # What lies beyond the calibrated range is clamped.
    x = torch.cat([x[0], x[0] * 1.7, x.new_tensor([0.0, 1e30, -1e30, 1e-30, -1e-30])]).sort().values
    low, high = qmin - float(zero), qmax - float(zero)
    y = F.fake_quantize(x, scale.log(), low, high)
    step = scale.log().exp().double()
    inside = (x.double() / step).clamp(low, high) * step
    assert ((y.double() - inside).abs() <= step * 0.5001).all()
    assert (y.diff() >= 0).all()
    again = F.fake_quantize(y, scale.log(), low, high)
    assert torch.equal(again, y), "what lies on the grid stays"


def test_what_is_not_a_number_stays_so_and_spoils_nothing_else() -> None:
    x = torch.tensor([1.0, float("nan"), -3.0])
    y = F.fake_quantize(x, torch.tensor(0.0), -2.0, 1.0)
    assert y.isnan().tolist() == [False, True, False]
    assert F.quantize(x, torch.tensor(1.0), torch.tensor(2.0), 0, 3).isnan().tolist() == [False, True, False]


@given(rows(most=1), st.integers(-38, 30), st.booleans(), st.integers(0, 2**16))
@fast
def test_gradients_are_the_formula_s_at_any_magnitude(x: Tensor, power: int, drop: bool, seed: int) -> None:
    """LSQ's gradient element by element, in Python's floats."""
    x = x[0].clone()
    low, high = -3.0, 4.0
    scale = max(10.0**power, F.MIN_SCALE)
    log_scale = torch.tensor(scale).log().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(x.shape, generator=generator)
    keep = torch.randint(0, 2, x.shape, generator=generator).float() if drop else None
    x.requires_grad_()
    y = F.fake_quantize(x, log_scale, low, high, keep)
    y.backward(grad)
    step, expected_x, expected_scale, size = float(log_scale.detach().exp()), [], 0.0, 0.0
    kept = [1.0] * len(x) if keep is None else keep.tolist()
    for v, g, quantized in zip(x.tolist(), grad.tolist(), kept, strict=True):
        position = v / step
        inside = low - 0.5 < position < high + 0.5
        expected_x.append(g if inside or not quantized else 0.0)
        if quantized:
            rounded = min(max(round(position), low), high) * step
            part = g * (rounded - v) if inside else g * rounded
            expected_scale += part
            size += abs(g) * (abs(rounded) + (abs(v) if inside else 0.0))
        else:
            size += abs(g * v)
    factor = (len(x) * 4.0) ** -0.5
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx(expected_x)
    assert log_scale.grad is not None
    assert abs(float(log_scale.grad) - expected_scale * factor) <= 1e-5 * size * factor + 1e-30


def test_an_empty_tensor_passes_in_both_directions() -> None:
    x, log_scale = torch.empty(0, 3, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    F.fake_quantize(x, log_scale, -2.0, 1.0).sum().backward()
    assert float(log_scale.grad) == 0.0
