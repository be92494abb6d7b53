"""Quantizer modules: state, rounding, drop."""

import pytest
import torch

from lightning_ptq import soft_rounding as S
from lightning_ptq.drop import DropMask
from lightning_ptq.quantizers import ActQuantizer, LogQuantizer, float_mode, initial_ranges
from lightning_ptq.ranges import Histogram, weight_qparams
from lightning_ptq.weights import ROUNDINGS, AdaRound, WeightQuantizer

pytestmark = pytest.mark.usefixtures("both_ways")


def ready_act(bits: int = 4, scale: float = 0.3, zero: float = 2.0) -> ActQuantizer:
    q = ActQuantizer(bits)
    q.set_range(torch.tensor(scale), torch.tensor(zero))
    return q


def ready_weight(rounding: str, bits: int = 3) -> tuple[WeightQuantizer, torch.Tensor]:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    q = ROUNDINGS[rounding](weight.shape, bits)
    q.set_range(weight, *weight_qparams(weight, "mse", bits, False, True))
    return q, weight


def test_a_quantizer_without_ranges_passes_floats_through() -> None:
    x = torch.randn(3, 4)
    assert ActQuantizer(4)(x) is x
    assert WeightQuantizer(x.shape, 4)(x) is x


def test_fresh_adaround_is_round_to_nearest_even_at_ties() -> None:
    q, weight = ready_weight("adaround")
    nearest, _ = ready_weight("nearest")
    torch.testing.assert_close(q(weight), nearest(weight), rtol=0, atol=0)
    ties = torch.tensor([[0.5, 1.5, 2.5, -0.5]])
    q = AdaRound(ties.shape, 4)
    q.set_range(ties, torch.ones(1), torch.full((1,), 8.0))
    assert q(ties).tolist() == ties.round().tolist()
    assert q.flipped(ties) == 0


def test_rounding_is_soft_only_while_it_is_learned() -> None:
    q, weight = ready_weight("adaround")
    hard = q(weight)
    q.alpha.requires_grad_(True)
    soft = q(weight)
    torch.testing.assert_close(soft, weight.clamp(hard.min(), hard.max()), atol=0.5, rtol=0)
    assert not torch.equal(soft, hard)
    soft.sum().backward()
    assert q.alpha.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(q(weight), hard)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("bits", [2, 8])
def test_soft_weights_and_their_gradient_follow_the_definition(bits: int, held: bool) -> None:
    q, weight = ready_weight("adaround", bits)
    learned = [q.alpha.requires_grad_(True), q.log_gain.requires_grad_(True)]
    if held:
        q.hold(weight)
    for _ in range(2):  # what is held depends on neither
        q.alpha.data.normal_(std=2.0)
        q.log_gain.data.normal_(std=0.1)
        up = (1.2 * q.alpha.sigmoid() - 0.1).clamp(0, 1)
        integers = ((weight / q.scale).floor() + up + q.zero_point).clamp(q.qmin, q.qmax)
        slow = (integers - q.zero_point) * q.scale * q.log_gain.exp()
        direction = torch.randn_like(weight)
        expected = torch.autograd.grad((slow * direction).sum(), learned)
        soft = q(weight)
        torch.testing.assert_close(soft, slow)
        torch.testing.assert_close(torch.autograd.grad((soft * direction).sum(), learned), expected)
        assert all(float(gradient.abs().sum()) > 0 for gradient in expected)


def test_the_regulariser_reads_the_rounding_that_the_weight_was_computed_with() -> None:
    q, weight = ready_weight("adaround")
    q.alpha.requires_grad_(True)
    q(weight)
    h = q.take_rounding()
    torch.testing.assert_close(h, S.rectified_sigmoid(q.alpha))
    assert torch.autograd.grad(h.sum(), q.alpha)[0].abs().sum() > 0
    assert q._h is None, "the graph of a step does not outlive it"


def test_held_integers_are_those_of_the_layer_until_they_are_released() -> None:
    q, weight = ready_weight("adaround")
    before = q(weight, gain=False)
    q.hold(weight)
    q.log_gain.data.fill_(0.3)
    assert torch.equal(q(weight, gain=False), before)
    assert torch.equal(q(weight), (q.integers(weight) - q.zero_point) * q.effective_scale)
    with initial_ranges(q):
        assert torch.equal(q(weight), before)
    q.release()
    q.alpha.data.neg_()
    assert not torch.equal(q(weight, gain=False), before)


def test_a_flipped_rounding_moves_a_weight_by_one_step() -> None:
    q, weight = ready_weight("adaround", bits=8)
    before = q.integers(weight)
    q.alpha.data.neg_()
    moved = (q.integers(weight) - before).abs()
    assert moved.max() == 1
    assert q.flipped(weight) == int(moved.sum())
    q.reset(weight)
    assert q.flipped(weight) == 0


def test_drop_keeps_whole_elements_and_follows_the_seed() -> None:
    x = torch.rand(1000)
    q = ready_act(2, 0.25, 0.0)
    q.drop = DropMask(0.5)
    q.drop.seed(0, 7)
    first, second = q(x), q(x)
    assert not torch.equal(first, second)
    q.drop.seed(0, 7)
    assert torch.equal(q(x), first)
    q.drop = None
    full = q(x)
    assert ((first == x) | (first == full)).all()
    with torch.no_grad():
        q.drop = DropMask(0.5)
        assert torch.equal(q(x), full), "inference never drops"


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 0.9])
def test_drop_probability(probability: float) -> None:
    mask = DropMask(probability)
    mask.seed(0, 0)
    x = torch.empty(100_000)
    keep = mask.keep(x)
    if probability == 0.0:
        assert keep is None
    else:
        # Five standard deviations of a binomial.
        assert abs(float(keep.float().mean()) - (1 - probability)) < 5 * 0.5 / 100_000**0.5


@pytest.mark.parametrize("probability", [0.25, 0.5])
@pytest.mark.parametrize("shape", [(3, 5, 7, 2), (13,), (4, 1, 3, 3)])
def test_masks_lie_in_memory_as_their_tensor_does(probability: float, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    layouts = (
        [x, x.to(memory_format=torch.channels_last), x[:, 1:3], x.transpose(1, 2)] if x.dim() == 4 else [x, x[::2]]
    )
    for y in layouts:
        mask = DropMask(probability)
        mask.seed(0, 0)
        keep = mask.keep(y)
        assert keep.shape == y.shape
        assert set(keep.unique().tolist()) <= {0.0, 1.0}
        if y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last):
            assert keep.stride() == y.stride()
            mask.seed(0, 0)
            flat = mask.keep(torch.empty(y.numel()))
            assert torch.equal(keep.as_strided(flat.shape, (1,), keep.storage_offset()), flat)


def test_masks_are_a_function_of_seeds_and_order_alone() -> None:
    def steps(mask: DropMask, first: int) -> list[torch.Tensor]:
        masks = []
        for step in range(first, 4):
            mask.seed(5, step)
            masks += [mask.keep(torch.empty(size)).clone() for size in (30, 1000, 1000)]
        return masks

    whole, resumed = DropMask(0.5), DropMask(0.5)
    resumed.seed(1, 0)
    resumed.keep(torch.empty(1000))  # of another unit, another process
    for a, b in zip(steps(whole, 0)[6:], steps(resumed, 2), strict=True):
        assert torch.equal(a, b)


def test_no_element_shares_its_draws_with_another_or_another_step() -> None:
    mask, rows = DropMask(0.5), []
    for step in range(300):
        mask.seed(0, step)
        rows += [mask.keep(torch.empty(64)).clone() for _ in range(2)]
    draws = torch.stack(rows).float()  # (600, 64)
    assert ((draws.mean(0) - 0.5).abs() < 5 * 0.5 / 600**0.5).all()
    assert ((draws.mean(1) - 0.5).abs() < 5 * 0.5 / 64**0.5).all()
    correlation = torch.corrcoef(draws.T) - torch.eye(64)
    assert float(correlation.abs().max()) < 5 / 600**0.5
    assert len(draws.unique(dim=0)) > 590, "a window may come twice, but seldom"


def test_state_restores_values_and_readiness() -> None:
    q, twin = ready_act(), ActQuantizer(4)
    twin.load_state_dict(q.state_dict())
    x = torch.randn(50)
    assert torch.equal(twin(x), q(x))
    w, weight = ready_weight("adaround")
    other = AdaRound(weight.shape, 3)
    other.load_state_dict(w.state_dict())
    assert torch.equal(other(weight), w(weight))


def test_initial_ranges_and_float_mode_leave_no_trace() -> None:
    q, x = ready_act(), torch.randn(50)
    start = q(x)
    q.log_scale.data.add_(0.5)
    learned = q(x)
    with initial_ranges(q):
        torch.testing.assert_close(q(x), start)
    with float_mode(q):
        assert q(x) is x
    assert torch.equal(q(x), learned)


@pytest.mark.parametrize("x", [torch.zeros(8), torch.full((8,), 3.0), torch.full((8,), -1e-12)])
def test_constant_input_gives_finite_output(x: torch.Tensor) -> None:
    from lightning_ptq.ranges import Histogram

    histogram = Histogram()
    histogram.update(x)
    for method in ("minmax", "mse", "percentile"):
        q = ActQuantizer(4)
        q.set_range(*histogram.qparams(method, 4, False))
        assert q.scale.isfinite()
        torch.testing.assert_close(q(x), x, atol=1e-2, rtol=1e-2)


def test_all_zero_channels_stay_zero() -> None:
    weight = torch.randn(4, 9)
    weight[2] = 0
    for method in ("minmax", "mse", "percentile"):
        q = AdaRound(weight.shape, 2)
        q.set_range(weight, *weight_qparams(weight, method, 2, False, True))
        assert q.scale.isfinite().all()
        assert (q(weight)[2] == 0).all()
        q.alpha.requires_grad_(True)
        q(weight).sum().backward()
        assert q.alpha.grad.isfinite().all()


def test_the_logarithmic_grid_is_powers_of_two_below_the_largest_value() -> None:
    q = LogQuantizer(bits=3)
    histogram = Histogram()
    histogram.update(torch.tensor([0.0, 0.75]))
    q.start(histogram, "mse")
    x = torch.rand(1000).square() * 0.9
    x[:2] = torch.tensor([0.0, 1e-30])
    grid = 0.75 * 2.0 ** -torch.arange(8)
    nearest = (x.clamp(min=1e-38)[:, None].log() - grid.log()).abs().argmin(1)  # nearest by ratio, not by difference
    torch.testing.assert_close(q(x), grid[nearest])


def test_the_logarithmic_quantizer_has_straight_through_gradients() -> None:
    q = LogQuantizer(bits=2)
    q.set_range(torch.tensor(1.0), torch.tensor(0.0))
    q.log_scale.requires_grad_(True)
    x = torch.tensor([0.9, 0.3, 0.01], requires_grad=True)  # 1, 1/4, and below the grid: 1/8
    y = q(x)
    assert y.tolist() == [1.0, 0.25, 0.125]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]
    assert q.log_scale.grad is not None
    assert float(q.log_scale.grad) == pytest.approx(1.375)
