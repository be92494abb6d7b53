"""Kernels compute what torch's operations do: those in C as they are, Triton's by its interpreter, on the CPU.

`test_functional` and others compare both with formulas.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_ptq import functional as F
from lightning_ptq import kernels
from lightning_ptq import soft_rounding as S
from lightning_ptq.drop import DropMask
from lightning_ptq.losses.reconstruction import reconstruction_loss

NAMES = (
    "fake_quantization",
    "fake_quantization_keeps_nan",
    "gradients_of_fake_quantization",
    "draws_are_a_function_of_seed_and_call",
    "mixing",
    "weighted_error",
    "soft_rounding",
    "soft_rounding_keeps_nan",
    "what_is_undecided",
)
LAYOUTS = {
    "as usual": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2),
    "sliced": lambda x: x[:, 1:],
}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which torch for CUDA brings")
needs_compiler = pytest.mark.skipif(kernels.cpu_kernels() is None, reason="needs a C compiler with OpenMP")


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.interpreted_kernels"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_equals_the_operations(name: str, done: subprocess.CompletedProcess[str]) -> None:
    assert name in done.stdout.splitlines(), done.stderr


@needs_triton
def test_every_check_has_a_test(done: subprocess.CompletedProcess[str]) -> None:
    assert tuple(done.stdout.splitlines()) == NAMES, done.stderr


@pytest.mark.skipif(find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton, and no GPU")
def test_where_triton_can_compile_nothing_plain_operations_are_left() -> None:
    kernels._gpu_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton can't compile here"):
            assert kernels._gpu_kernels() is None
    finally:
        kernels._gpu_kernels.cache_clear()


@needs_compiler
@pytest.mark.parametrize("shape", [(3, 5, 7, 2), (3, 8, 40, 50), (1, 6, 1, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("drop", [False, True])
def test_compiled_steps_are_those_of_operations(
    shape: tuple[int, ...], layout: str, drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, other, grad = (LAYOUTS[layout](3.0 * y) for y in torch.randn(3, *shape))
    importance = torch.rand(x.shape[1])

    def found() -> list[Tensor]:
        mask = DropMask(0.5 if drop else 0.0)
        mask.seed(1, 2)
        mixed = mask.mix(x, other).detach().requires_grad_()
        log_scale = torch.zeros(()).requires_grad_()
        y = F.fake_quantize(mixed, log_scale, -2.0, 5.0, mask.keep(mixed))
        loss = reconstruction_loss(y, other, importance)
        exact = torch.autograd.grad((y * grad).sum(), mixed, retain_graph=True)
        return [mixed.detach(), y.detach(), *exact, loss.detach(), *torch.autograd.grad(loss, (mixed, log_scale))]

    compiled = found()
    monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    plain = found()
    for a, b in zip(compiled[:3], plain[:3], strict=True):
        assert torch.equal(a, b), "elements are the same bit by bit"
    for a, b in zip(compiled[3:], plain[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@needs_compiler
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    x, teacher, importance = torch.randn(4, 64, 33, 31), torch.randn(4, 64, 33, 31), torch.rand(64)
    alpha, log_gain = torch.randn(64, 600), 0.1 * torch.randn(64, 1)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            leaf, log_scale, a, gain = (y.clone().requires_grad_() for y in (x, torch.zeros(()), alpha, log_gain))
            weight, h = S.soft_round(a, torch.zeros_like(alpha), torch.ones_like(alpha), gain)
            loss = reconstruction_loss(F.fake_quantize(leaf, log_scale, -2.0, 5.0), teacher, importance)
            total = loss + S.undecided([h], 5.0) + (weight * alpha).sum()
            found.append([total.detach(), *torch.autograd.grad(total, (leaf, log_scale, a, gain))])
        finally:
            torch.set_num_threads(before)
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            assert torch.equal(first, other)


@needs_compiler
def test_what_is_traced_or_of_another_type_gets_operations() -> None:
    assert kernels.kernels_for(torch.ones(2)) is kernels.cpu_kernels()
    for x in (torch.ones(2).double(), torch.ones(2).bfloat16(), torch.ones(2, device="meta")):
        assert kernels.kernels_for(x) is None
    assert kernels.kernels_for(FakeTensorMode().from_tensor(torch.ones(2))) is None
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert kernels.kernels_for(x) is None
    assert kernels.kernels_for(torch.tensor([1.0 + 2.0j]).conj().imag) is None
    x, log_scale = torch.randn(3, 4), torch.tensor(-0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        traced = torch.jit.trace(lambda y: F.fake_quantize(y, log_scale, -2.0, 1.0), x, check_trace=False)
    assert torch.equal(traced(2 * x), F.fake_quantize(2 * x, log_scale, -2.0, 1.0)), "not a constant"


@needs_compiler
def test_what_is_not_a_number_is_seen_in_the_loss() -> None:
    nan = torch.tensor([[float("nan"), 1.0]])
    weight, h = S.soft_round(nan, torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 1))
    assert weight.isnan().tolist() == h.isnan().tolist() == [[True, False]]
    assert S.undecided([h], 2.0).isnan()


@needs_compiler
@pytest.mark.parametrize("compiler", ["nowhere", "false", "gcc '"])
def test_a_compiler_that_fails_falls_back_on_the_system_s(compiler: str) -> None:
    assert found_with(CC=compiler) == ("module", "")


def test_without_a_compiler_operations_are_left() -> None:
    found, said = found_with(CC="nowhere", PATH="")
    assert found == "NoneType"
    assert "take longer: a C compiler with OpenMP is needed, such as gcc ('clang': [Errno 2]" in said


def found_with(**changes: str) -> tuple[str, str]:
    """What `cpu_kernels` is in a process of such an environment, and what that prints to stderr."""
    code = "from lightning_ptq import kernels; print(type(kernels.cpu_kernels()).__name__)"
    settings: dict[str, Any] = {"cwd": Path(__file__).parents[1], "env": os.environ | changes}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **settings)
    return done.stdout.strip(), done.stderr


@needs_compiler
@pytest.mark.parametrize(
    "importance",
    [torch.ones(()).expand(6), torch.arange(12.0)[::2], torch.ones(6, dtype=torch.float64), torch.ones(6)],
    ids=["expanded", "strided", "float64", "plain"],
)
def test_whatever_importance_weighs_like_formulas(importance: Tensor) -> None:
    student, teacher = torch.randn(2, 4, 6, 5, 5)
    wanted = (importance.view(-1, 1, 1) * (student - teacher).square()).sum() / 100
    torch.testing.assert_close(reconstruction_loss(student, teacher, importance), wanted.to(torch.float32))


@needs_compiler
def test_gains_of_any_shape_scale_like_formulas() -> None:
    alpha, low, step = torch.randn(3, 5, 4, 1, 1)
    for shape in ((5, 1, 1, 1), (1, 1, 1, 1), (1, 4, 1, 1), (5, 4, 1, 1)):
        log_gain = torch.randn(shape)
        weight, h = S.soft_round(alpha, low, step, log_gain)
        torch.testing.assert_close(weight, (low + step * S.rectified_sigmoid(alpha)) * log_gain.exp())
        torch.testing.assert_close(h, S.rectified_sigmoid(alpha))


def test_a_second_derivative_is_refused() -> None:
    x, log_scale = torch.randn(5, requires_grad=True), torch.zeros(())
    y = F.fake_quantize(x, log_scale, -2.0, 1.0).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
