"""Rounding by learned divisors, and rounding that is learned once more by the whole network."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ptq.quantizers import initial_ranges
from lightning_ptq.ranges import weight_qparams
from lightning_ptq.weights import ROUNDINGS, AdaRound, FlexRound, WeightQuantizer

pytestmark = pytest.mark.usefixtures("both_ways")


def ready(rounding: str, bits: int = 3) -> tuple[Any, Tensor]:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    q = ROUNDINGS[rounding](weight.shape, bits)
    q.set_range(weight, *weight_qparams(weight, "mse", bits, False, True))
    return q, weight


def learn(q: WeightQuantizer) -> list[Tensor]:
    return [parameter.requires_grad_(True) for parameter in (*q.roundings, q.log_gain)]


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("rounding", ["adaround", "flexround"])
def test_what_has_learned_nothing_rounds_to_nearest(rounding: str, bits: int) -> None:
    q, weight = ready(rounding, bits)
    nearest, _ = ready("nearest", bits)
    assert torch.equal(q(weight), nearest(weight))
    for parameter in q.roundings:
        parameter.data.normal_(std=2.0)
    assert q.flipped(weight) > 0
    with initial_ranges(q):
        assert torch.equal(q(weight), nearest(weight))
    q.reset(weight)
    assert torch.equal(q(weight), nearest(weight))


def test_divided_weights_and_their_gradients_follow_the_definition() -> None:
    q, weight = ready("flexround")
    learned = learn(q)
    assert isinstance(q, FlexRound)
    generator = torch.Generator().manual_seed(1)
    for parameter in learned:
        parameter.data.normal_(std=0.3, generator=generator)
    direction = torch.randn(weight.shape, generator=generator)
    divisor = (q.log_element / 4).exp() * (q.log_output / 4).exp() * (q.log_input / 4).exp()  # 2 ** (3 bits - 1)
    position = weight / q.scale / divisor
    integers = (position.round() + q.zero_point).clamp(q.qmin, q.qmax)
    scale = q.scale * q.log_gain.exp()
    out = q(weight)
    torch.testing.assert_close(out, (integers - q.zero_point) * scale)
    gradients = torch.autograd.grad((out * direction).sum(), learned)
    # Straight through the rounding: d round(w / (s d)) / d log d = -w / (s d), and nothing where the grid ends.
    inside = position.round() + q.zero_point == integers
    per_weight = (-direction * position / 4 * scale * inside).detach()
    assert 0 < int(inside.sum()) < inside.numel()
    torch.testing.assert_close(gradients[0], per_weight)
    torch.testing.assert_close(gradients[1], per_weight.sum((1, 2, 3), keepdim=True))
    torch.testing.assert_close(gradients[2], per_weight.sum((0, 2, 3), keepdim=True))
    torch.testing.assert_close(gradients[3], (direction * out).sum((1, 2, 3), keepdim=True).detach())
    with torch.no_grad():
        assert torch.equal(q(weight), (q.integers(weight) - q.zero_point) * q.effective_scale)


def test_a_divisor_moves_a_weight_by_several_steps() -> None:
    q, weight = ready("flexround", bits=8)
    before = q.integers(weight)
    q.log_element.data.fill_(-0.2 * 2**7)
    moved = (q.integers(weight) - before).abs()
    assert moved.max() > 1
    assert moved[weight.abs() < 0.01].max() <= 1, "a divisor moves large weights farther"


def annealed(bits: int = 3) -> tuple[AdaRound, Tensor]:
    """A rounding as a unit leaves it: some weights away from nearest, every alpha far from 0."""
    q, weight = ready("adaround", bits)
    q.alpha.data.normal_(generator=torch.Generator().manual_seed(2)).sign_().mul_(9.0)
    return q, weight


def test_reopening_keeps_every_integer_and_brings_the_other_one_near() -> None:
    q, weight = annealed()
    before = q.integers(weight)
    q.reopen(weight)
    assert torch.equal(q.integers(weight), before)
    assert float(q.alpha.abs().min()) >= 0.25
    assert float(q.alpha.abs().max()) <= 0.5
    # A weight near the middle that was rounded to nearest is nearer than one that lies on its integer.
    fraction = (weight / q.scale) % 1.0
    as_nearest = (fraction >= 0.5) == (q.alpha >= 0)
    torch.testing.assert_close(q.alpha[as_nearest], _beyond(fraction[as_nearest] - 0.5), atol=1e-5, rtol=0)


def _beyond(middle: Tensor) -> Tensor:
    return torch.where(middle >= 0, middle.clamp(min=0.25), middle.clamp(max=-0.25))


@pytest.mark.parametrize("held", [False, True])
def test_straight_through_the_weight_is_hard_and_the_gradient_that_of_one_step(held: bool) -> None:
    q, weight = annealed()
    q.straight = True
    q.log_gain.data.fill_(0.1)
    learned = learn(q)
    if held:
        q.hold(weight)
    out = q(weight)
    with torch.no_grad():
        assert torch.allclose(out, q(weight), atol=1e-6)
    direction = torch.randn_like(weight)
    alpha, gain = torch.autograd.grad((out * direction).sum(), learned)
    down = (weight / q.scale).floor() + q.zero_point
    inside = (down >= q.qmin) & (down < q.qmax)
    torch.testing.assert_close(alpha, (direction * inside * q.effective_scale).detach())
    torch.testing.assert_close(gain, (direction * out).sum((1, 2, 3), keepdim=True).detach())


@pytest.mark.parametrize("rounding", ["nearest", "adaround", "flexround"])
def test_zero_weights_stay_finite(rounding: str) -> None:
    weight = torch.randn(4, 9)
    weight[2] = 0
    q = ROUNDINGS[rounding](weight.shape, 2)
    q.set_range(weight, *weight_qparams(weight, "mse", 2, False, True))
    learned = learn(q) if rounding != "nearest" else []
    out = q(weight)
    assert (out[2].detach() == 0).all() or rounding == "adaround"  # soft rounding starts from fractions
    for gradient in torch.autograd.grad(out.sum(), learned) if learned else ():
        assert gradient.isfinite().all()
