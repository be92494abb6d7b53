"""The kernels of `cpu_kernels.c`, compiled for this machine when the module is imported, which takes half a second.

Names, arguments and results are those of `gpu_kernels`, but that a random choice is a mask (uint8) of the tensor's
shape. Raises `OSError` on import where there is no C compiler with OpenMP.

Attributes:
    VERSION: a digest of the machine code, which depends on the compiler and the CPU: sums with it, in their last bits.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

# Elements of one part of a sum.
_BLOCK = 4096
# Tensors below are done sooner than a second thread wakes up.
_FEW = 2**15
# No contraction, and nothing of -ffast-math that changes results: what has torch's operations has their bits.
_FLAGS = "-std=c11 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=off -shared -fPIC"


def _compiled() -> tuple[CDLL, str]:
    """The kernels, and a digest of their machine code."""
    failed = []
    for compiler in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        if compiler:
            try:
                return _compiled_by(compiler)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                failed.append(f"{compiler!r}: {error}")
    raise OSError(f"a C compiler with OpenMP is needed, such as gcc ({failed[-1]})")


def _compiled_by(compiler: str) -> tuple[CDLL, str]:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "kernels.so")
        # gcc's OpenMP finds its functions in the library that torch has loaded, so that both have one pool of threads.
        source = str(Path(__file__).with_suffix(".c"))
        options = [*_FLAGS.split(), f"-DBLOCK={_BLOCK}", "-o", str(library), source, "-lm"]
        subprocess.run([*shlex.split(compiler), *options], check=True, capture_output=True, timeout=60)
        return CDLL(str(library)), hashlib.sha256(library.read_bytes()).hexdigest()[:16]


_p, _f, _n, _i = c_void_p, c_float, c_int64, c_int
_ARGUMENTS = {
    "fake_quantize": (_p, _p, _p, _n, _p, _f, _f, _i),
    "fake_quantize_backward": (_p, _p, _p, _p, _p, _p, _n, _p, _f, _f, _f, _i),
    "mix": (_p, _p, _p, _p, _n, _i),
    "weighted_error": (_p, _p, _p, _p, _p, _n, _n, _n, _i, _f, _i),
    "weighted_error_backward": (_p, _p, _p, _p, _p, _n, _n, _n, _i, _f, _i),
    "soft_round": (_p, _p, _p, _p, _p, _p, _n, _n, _i, _f, _f, _i),
    "soft_round_backward": (_p, _p, _p, _p, _p, _p, _p, _p, _n, _n, _i, _f, _f, _i),
    "undecided": (_p, _p, _p, _n, _f, _i),
    "undecided_backward": (_p, _p, _p, _n, _f, _i),
}
_library, VERSION = _compiled()
for _name, _types in _ARGUMENTS.items():
    _function = getattr(_library, _name)
    _function.argtypes, _function.restype = _types, None


def mix(drawn: Tensor, other: Tensor, keep: Tensor) -> Tensor:
    """Elements of `drawn` where `keep` is 1, else of `other`; all laid out alike."""
    out, n = torch.empty_like(drawn), drawn.numel()
    _library.mix(drawn.data_ptr(), other.data_ptr(), keep.data_ptr(), out.data_ptr(), n, _threads(n))
    return out


def fake_quantize(x: Tensor, scale: Tensor, low: float, high: float, keep: Tensor | None) -> Tensor:
    """`x` on the grid of `scale` (), or as it is where `keep` is 0."""
    y, n = torch.empty_like(x), x.numel()
    mask = None if keep is None else keep.data_ptr()
    _library.fake_quantize(x.data_ptr(), mask, y.data_ptr(), n, scale.data_ptr(), low, high, _threads(n))
    return y


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, low: float, high: float, keep: Tensor | None, factor: float
) -> tuple[Tensor, Tensor]:
    """(gradient of `x`, `factor` times the sum of `grad` times the output's derivative by the log scale, ())."""
    grad_x, n = torch.empty_like(x), x.numel()
    parts, total = _sums(x, n)
    mask = None if keep is None else keep.data_ptr()
    at = grad.data_ptr(), x.data_ptr(), mask, grad_x.data_ptr(), parts.data_ptr(), total.data_ptr()
    _library.fake_quantize_backward(*at, n, scale.data_ptr(), low, high, factor, _threads(n))
    return grad_x, total


def weighted_error(student: Tensor, teacher: Tensor, weights: Tensor, factor: float) -> Tensor:
    """`factor` times the sum of weights * (student - teacher)^2, (); student and teacher (B, C, ...), weights (C,)."""
    parts, total = _sums(student, student.numel())
    at = student.data_ptr(), teacher.data_ptr(), weights.data_ptr(), parts.data_ptr(), total.data_ptr()
    _library.weighted_error(*at, *_rows(student), factor, _threads(student.numel()))
    return total


def weighted_error_backward(student: Tensor, teacher: Tensor, weights: Tensor, grad: Tensor, factor: float) -> Tensor:
    """weights * (student - teacher) * grad * factor, `grad` (); other arguments as in `weighted_error`."""
    out = torch.empty_like(student)
    at = student.data_ptr(), teacher.data_ptr(), weights.data_ptr(), grad.data_ptr(), out.data_ptr()
    _library.weighted_error_backward(*at, *_rows(student), factor, _threads(student.numel()))
    return out


def soft_round(
    alpha: Tensor, low: Tensor, step: Tensor, log_gain: Tensor, span: float, start: float
) -> tuple[Tensor, Tensor]:
    """(weight, h) as in `soft_rounding.soft_round`, h = clamp(span * sigmoid(alpha) + start, 0, 1).

    All are contiguous, and `alpha`, `low` and `step` of one shape (O, ...); `log_gain` holds O numbers, or one.
    """
    weight, h, n = torch.empty_like(alpha), torch.empty_like(alpha), alpha.numel()
    at = (x.data_ptr() for x in (alpha, low, step, log_gain, weight, h))
    _library.soft_round(*at, len(alpha), n // len(alpha), log_gain.numel() > 1, span, start, _threads(n))
    return weight, h


def soft_round_backward(
    alpha: Tensor,
    step: Tensor,
    log_gain: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_h: Tensor | None,
    span: float,
    start: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `alpha` and, summed over each output channel (O,), of `log_gain`."""
    grad_alpha, grad_gain, n = torch.empty_like(alpha), alpha.new_empty(len(alpha)), alpha.numel()
    read = alpha.data_ptr(), step.data_ptr(), log_gain.data_ptr(), weight.data_ptr(), grad_weight.data_ptr()
    at = *read, None if grad_h is None else grad_h.data_ptr(), grad_alpha.data_ptr(), grad_gain.data_ptr()
    shape = len(alpha), n // len(alpha), log_gain.numel() > 1
    _library.soft_round_backward(*at, *shape, span, start, _threads(n))
    return grad_alpha, grad_gain


def undecided(roundings: Sequence[Tensor], beta: float | Tensor) -> Tensor:
    """sum(1 - |2 h - 1| ** beta) over all elements of contiguous tensors, ()."""
    beta = float(beta)
    parts, total = _sums(roundings[0], max(h.numel() for h in roundings))
    total.zero_()
    for h in roundings:
        _library.undecided(h.data_ptr(), parts.data_ptr(), total.data_ptr(), h.numel(), beta, _threads(h.numel()))
    return total


def undecided_backward(h: Tensor, beta: float | Tensor, grad: Tensor) -> Tensor:
    """Gradient of `h` where that of `undecided` is `grad` ()."""
    out, n = torch.empty_like(h), h.numel()
    _library.undecided_backward(h.data_ptr(), grad.data_ptr(), out.data_ptr(), n, float(beta), _threads(n))
    return out


def _sums(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Room for the sums of the blocks of `n` elements, and for their sum ()."""
    return x.new_empty(n // _BLOCK + 1), x.new_empty(())


def _threads(n: int) -> int:
    return 1 if n < _FEW else torch.get_num_threads()


def _rows(x: Tensor) -> tuple[int, int, int, bool]:
    """How `x` (B, C, ...) lies in memory: rows, columns, channels, and whether it is the columns that are channels."""
    channels = x.shape[1]
    if not x.numel():
        return 0, 1, 1, False
    if x.is_contiguous():
        return x.shape[0] * channels, x.numel() // (x.shape[0] * channels), channels, False
    return x.numel() // channels, channels, channels, True
