"""What learning the rounding leaves of a weight's error; the shares in `lightning_ptq/divergence.py` are less than it.

    python -m benchmarks.rounding_gain --root FOLDER

Units of ResNet-20 that read float activations, with 16-bit ones inside, are calibrated at each number of bits; printed
is the median over units of the reconstruction error after calibration, relative to that of rounding to nearest.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.common import DEFAULT_ROOT, calibrate, commit, trained
from lightning_ptq import ImageFolderData, PTQModule, QuantConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/, val/ and teachers/")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    print(f"commit {commit()}, {args.model}, {args.steps} steps per unit")
    for bits in args.bits:
        module = PTQModule(
            trained(args.model, args.root),
            QuantConfig(weight_bits=bits, act_bits=16),
            "adaround",
            input="fp",
            granularity="block",
            steps_per_unit=args.steps,
            network_steps=0,
            seed=0,
            report=False,
        )
        data = ImageFolderData(str(args.root), resize=None, crop=None, seed=0, validation_folder=None)
        with tempfile.TemporaryDirectory() as folder:
            calibrate(module, data, folder)
        left = [report.mse_after / report.mse_before for report in module.reports[1:-1]]  # the ends have 8 bits
        print(f"W{bits}: {median(left):.3f} of the error, from {min(left):.3f} to {max(left):.3f}", flush=True)


if __name__ == "__main__":
    main()
