"""What `keep_freed_memory` saves: one fake-quantization forward and backward, alternating between processes.

python -m benchmarks.allocator
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch

from lightning_ptq.allocator import keep_freed_memory
from lightning_ptq.functional import fake_quantize


def milliseconds() -> float:
    """Median of 40 passes over 32 images of 16 x 32 x 32."""
    torch.set_num_threads(1)
    x = torch.randn(32, 16, 32, 32).relu().requires_grad_()
    log_scale, grad = torch.tensor(-0.7, requires_grad=True), torch.randn(32, 16, 32, 32)
    times = []
    for _ in range(45):
        start = time.perf_counter()
        torch.autograd.grad(fake_quantize(x, log_scale, 0.0, 3.0), [x, log_scale], grad)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[5:])


def main() -> None:
    if len(sys.argv) > 1:
        if sys.argv[1] == "keep":
            keep_freed_memory()
        print(milliseconds())
        return
    times: dict[str, list[float]] = {"plain": [], "keep": []}
    for _ in range(3):
        for name, values in times.items():
            command = [sys.executable, "-m", "benchmarks.allocator", name]
            values.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    plain, keep = (statistics.median(values) for values in times.values())
    print(f"freed memory given back: {plain:.2f} ms, kept: {keep:.2f} ms, ratio {plain / keep:.1f}")


if __name__ == "__main__":
    main()
