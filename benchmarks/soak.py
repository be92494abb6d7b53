"""Many short calibrations in one process: what grows with their number, which should be nothing.

    python -m benchmarks.soak --runs 200

Every run has a network, data, Trainer and folder of its own, and a second network is calibrated again and again: hooks
left on a user's model would pile up there. The first runs warm up and do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import logging
import os
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.common import calibrate as fit
from lightning_ptq import CalibrationDataModule, PTQModule, QuantConfig

WARM_UP = 20


def network() -> nn.Module:
    """Three layers for (3, 8, 8) images."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def calibrate(model: nn.Module) -> None:
    """A short fit with all that one has: contrastive term, last epoch, validation, checkpoints, summary."""
    images = torch.randn(32, 3, 8, 8)
    module = PTQModule(
        model, QuantConfig(2, 2), contrastive=True, steps_per_unit=3, network_steps=2, batch_size=8, report=False
    )
    data = CalibrationDataModule.from_loaders([images], DataLoader(images, batch_size=16), calibration_samples=32)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        fit(module, data, folder)


def measure(model: nn.Module) -> dict[str, int]:
    """What a process holds. Of memory what is resident, and what of it is left without what malloc keeps for reuse."""
    gc.collect()
    resident = resident_kib()
    ctypes.CDLL(None).malloc_trim(0)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "resident KiB": resident,
        "resident KiB, in use": resident_kib(),
        "threads": len(os.listdir("/proc/self/task")),
        "Python threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "hooks on the model": sum(len(getattr(m, name)) for m in model.modules() for name in hooks),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
        "warning filters": len(warnings.filters),
        "log handlers": sum(len(logging.getLogger(name).handlers) for name in ("", *logging.root.manager.loggerDict)),
        "live tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "modules in sys": len(sys.modules),
    }


def resident_kib() -> int:
    """Memory of this process that is resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def soak(runs: int, warm_up: int = WARM_UP) -> tuple[dict[str, int], dict[str, int]]:
    """What the process holds after the warm-up, and after `runs` further calibrations."""
    model = network()

    def several(count: int) -> dict[str, int]:
        for run in range(count):
            calibrate(model if run % 2 else network())
        return measure(model)

    return several(warm_up), several(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as own:  # other processes' files come and go in the common one
        tempfile.tempdir = own
        start, end = soak(args.runs)
        tempfile.tempdir = None
    print(f"{args.runs} calibrations after {WARM_UP} to warm up\n{'':22} {'start':>9} {'end':>9} {'growth %':>9}")
    for name, before in start.items():
        print(f"{name:22} {before:9} {end[name]:9} {100.0 * (end[name] - before) / max(before, 1):9.2f}")


if __name__ == "__main__":
    main()
