"""Checks of the Triton kernels on a CPU, by Triton's interpreter (`TRITON_INTERPRET=1`, as `test_kernels` runs it).

Prints the name of every check that passed. In a process of its own, since Triton decides when it is imported.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ptq import functional as F
from lightning_ptq import gpu_kernels as K
from lightning_ptq import soft_rounding as S

LOW, HIGH, LOG_SCALE = -2.0, 5.0, torch.tensor(-0.1)
SHAPES = [(3, 5, 7, 2), (3, 5, 40, 50), (5,)]  # less than a block, several of them, less than eight


def draw(call: int = 1, probability: float = 0.25, seed: int = 123456789012345678) -> K.Draw:
    return K.Draw(torch.tensor(seed), call, probability)


def inputs() -> list[tuple[Tensor, K.Draw | None]]:
    return [(3.0 * torch.randn(shape), choice) for shape, choice in itertools.product(SHAPES, (None, draw()))]


def fake_quantization() -> None:
    for x, choice in inputs():
        x.flatten()[0] = 2.5 * LOG_SCALE.exp()  # a tie
        expected = F.fake_quantize(x, LOG_SCALE, LOW, HIGH, None if choice is None else choice.mask(x))
        found = K.fake_quantize(x, LOG_SCALE.exp(), LOW, HIGH, choice)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        half = K.fake_quantize(x.bfloat16(), LOG_SCALE.exp(), LOW, HIGH, choice)
        assert half.dtype == torch.bfloat16
        exact = K.fake_quantize(x.bfloat16().float(), LOG_SCALE.exp(), LOW, HIGH, choice)
        torch.testing.assert_close(half.float(), exact, rtol=2**-7, atol=0)  # the interpreter cuts digits off


def fake_quantization_keeps_nan() -> None:
    x = torch.tensor([float("nan"), 1.0])
    assert K.fake_quantize(x, LOG_SCALE.exp(), LOW, HIGH, None).isnan().tolist() == [True, False]


def gradients_of_fake_quantization() -> None:
    for x, choice in inputs():
        z, log_scale = x.clone().requires_grad_(), LOG_SCALE.clone().requires_grad_()
        grad = torch.randn_like(x)
        F.fake_quantize(z, log_scale, LOW, HIGH, None if choice is None else choice.mask(x)).backward(grad)
        factor = (x.numel() * HIGH) ** -0.5
        found, total = K.fake_quantize_backward(grad, x, LOG_SCALE.exp(), LOW, HIGH, choice, factor)
        torch.testing.assert_close(found, z.grad, rtol=0, atol=0)
        torch.testing.assert_close(total, log_scale.grad, rtol=1e-5, atol=1e-6)


def draws_are_a_function_of_seed_and_call() -> None:
    x = torch.empty(2**16)
    masks = [draw(*key).mask(x) for key in ((1, 0.5), (2, 0.5), (1, 0.5, 7))]
    assert torch.equal(draw(1, 0.5).mask(x), masks[0])
    deviation = 2**-8  # of the mean of so many fair draws: half of the root of their number
    for a, b in itertools.combinations(masks, 2):
        assert abs(float((a * b).mean()) - 0.25) < 5 * deviation
    for probability in (0.1, 0.5, 0.9):
        columns = draw(1, probability).mask(x).view(-1, 8).mean(0)  # eight elements share a call
        assert (columns - probability).abs().max() < 5 * 3 * deviation


def mixing() -> None:
    a, b = torch.randn(2, 3, 5, 40, 50)
    torch.testing.assert_close(draw().mix(a, b), torch.lerp(b, a, draw().mask(a)), rtol=0, atol=0)


def weighted_error() -> None:
    student, teacher, weights = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5), torch.rand(6)
    expected = weights.view(-1, 1, 1) * (student - teacher)
    for layout in (torch.contiguous_format, torch.channels_last):
        a, b = (x.contiguous(memory_format=layout) for x in (student, teacher))
        torch.testing.assert_close(K.weighted_error(a, b, weights, 3.0), 3.0 * (expected * (student - teacher)).sum())
        found = K.weighted_error_backward(a, b, weights, torch.tensor(2.0), 3.0)
        torch.testing.assert_close(found, 6.0 * expected)


def soft_rounding() -> None:
    for gains, undecided in itertools.product((7, 1), (True, False)):
        alpha, low, step = 3.0 * torch.randn(7, 5, 31, 31), torch.randn(7, 5, 31, 31), torch.rand(7, 5, 31, 31)
        log_gain = 0.1 * torch.randn(gains, 1, 1, 1)
        z, gain = alpha.clone().requires_grad_(), log_gain.clone().requires_grad_()
        expected = S.soft_round(z, low, step, gain)
        found = K.soft_round(alpha, low, step, log_gain, S.ZETA - S.GAMMA, S.GAMMA)
        torch.testing.assert_close(found, expected)
        grads = torch.randn(2, *alpha.shape)
        torch.autograd.backward(expected[: 1 + undecided], list(grads[: 1 + undecided]))
        grad_h = grads[1] if undecided else None
        at = alpha, step, log_gain, found[0], grads[0], grad_h, S.ZETA - S.GAMMA, S.GAMMA
        grad_alpha, grad_gain = K.soft_round_backward(*at)
        torch.testing.assert_close(grad_alpha, z.grad)
        torch.testing.assert_close(grad_gain.view(-1, 1, 1, 1).sum_to_size(gain.shape), gain.grad, rtol=1e-4, atol=1e-4)


def soft_rounding_keeps_nan() -> None:
    alpha = torch.tensor([[float("nan"), 1.0]])
    weight, h = K.soft_round(alpha, torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 1), S.ZETA - S.GAMMA, S.GAMMA)
    assert weight.isnan().tolist() == h.isnan().tolist() == [[True, False]]


def what_is_undecided() -> None:
    roundings = [torch.rand(50, 100), torch.tensor([0.0, 0.5, 1.0])]
    for beta in (20.0, 2.0):
        leaves = [h.clone().requires_grad_() for h in roundings]
        expected = S.undecided(leaves, beta)
        (3.0 * expected).backward()
        torch.testing.assert_close(K.undecided(roundings, torch.tensor(beta)), expected)
        for h, leaf in zip(roundings, leaves, strict=True):
            found = K.undecided_backward(h, torch.tensor(beta), torch.tensor(3.0))
            torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-6)


CHECKS: list[Callable[[], None]] = [
    fake_quantization,
    fake_quantization_keeps_nan,
    gradients_of_fake_quantization,
    draws_are_a_function_of_seed_and_call,
    mixing,
    weighted_error,
    soft_rounding,
    soft_rounding_keeps_nan,
    what_is_undecided,
]

if __name__ == "__main__":
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check()
        except Exception:
            traceback.print_exc()
        else:
            print(check.__name__)  # noqa: T201 (what `test_kernels` reads)
