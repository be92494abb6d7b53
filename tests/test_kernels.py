"""The Triton kernels compute what the plain operations do: by Triton's interpreter, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which torch for CUDA brings")


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.interpreted_kernels"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_equals_the_operations(name: str, done: subprocess.CompletedProcess[str]) -> None:
    assert name in done.stdout.splitlines(), done.stderr


def test_every_check_has_a_test(done: subprocess.CompletedProcess[str]) -> None:
    assert tuple(done.stdout.splitlines()) == NAMES, done.stderr
