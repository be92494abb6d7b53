"""The same job with other threads, processes and precisions: is it the same result?

    python -m benchmarks.same --root FOLDER               # runs what benchmarks/same.csv lacks, prints the table
    python -m benchmarks.same --bits w4a4 --seeds 0 1 2 --variants plain threads

ResNet-20, qdrop. Numbers of threads sum in another order and numbers of processes draw other batches (of the same 32
images together), so that no two are bit-equal; precisions round otherwise. The table has each variant's top-1 and
agreement with the teacher, and their differences from the plain run of the same seed: mean, standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_ptq as ptq
from benchmarks.common import DEFAULT_ROOT, append, commit, in_process, read, trained

# Threads of each process, processes, the Trainer's precision.
VARIANTS: dict[str, tuple[int, int, Any]] = {
    "plain": (1, 1, "32-true"),
    "threads": (2, 1, "32-true"),
    "two processes": (1, 2, "32-true"),
    "four processes": (1, 4, "32-true"),
    "bf16-mixed": (1, 1, "bf16-mixed"),
}
COLUMNS = ("variant", "bits", "steps", "seed", "teacher_top1", "student_top1", "agreement", "seconds", "commit")
BATCH = 32
# Calibrations of one process, which share its start.
TOGETHER = 5


def go(variant: str, bits: str, steps: int, seed: int, root: Path) -> dict[str, Any]:
    """The row of one calibration."""
    threads, processes, precision = VARIANTS[variant]
    torch.set_num_threads(threads)
    module = ptq.PTQModule(
        trained("resnet20", root),
        ptq.QuantConfig(int(bits[1]), int(bits[3])),
        steps_per_unit=steps,
        batch_size=BATCH // processes,
        seed=seed,
        report=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            accelerator="cpu",
            devices=processes,
            strategy="auto" if processes == 1 else "ddp_fork",
            precision=precision,
            max_epochs=-1,
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        ).fit(module, datamodule=ptq.ImageFolderData(str(root), resize=None, crop=None, seed=seed))
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return {
        "variant": variant,
        "bits": bits,
        "steps": steps,
        "seed": seed,
        "teacher_top1": round(summary["teacher_top1"], 3),
        "student_top1": round(summary["student_top1"], 3),
        "agreement": round(summary["teacher_agreement"], 3),
        "seconds": summary["wall_seconds"]["calibration"],
        "commit": commit(),
    }


def table(rows: list[dict[str, str]], bits: str, variants: list[str], seeds: list[int]) -> list[str]:
    """A line for each variant: top-1 and agreement, the difference of each from "plain" and its error."""

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else float("nan")

    lines = []
    for variant in variants:
        told = []
        for measure in ("student_top1", "agreement"):
            found = {(r["variant"], int(r["seed"])): float(r[measure]) for r in rows if r["bits"] == bits}
            values = [found[variant, seed] for seed in seeds]
            differences = [value - found["plain", seed] for value, seed in zip(values, seeds, strict=True)]
            what = f"{statistics.mean(values):6.2f} +- {spread(values):.2f}"
            error = spread(differences) / len(seeds) ** 0.5
            told.append(f"{what}  {statistics.mean(differences):+5.2f} +- {error:.2f}")
        lines.append(f"{bits} {variant:<15} " + "   ".join(told))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/, val/ and teachers/")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help='besides "plain"')
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w2a2"])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/same.csv"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        *run, seeds = json.loads(args.one)
        print(json.dumps([go(*run, seed, args.root) for seed in seeds]))
        return
    variants = list(dict.fromkeys(["plain", *args.variants]))
    print(
        f"{args.steps} steps, {len(args.seeds)} seeds: top-1, difference from plain; agreement, difference from plain"
    )
    for bits in args.bits:
        for variant in variants:
            run = (variant, bits, args.steps)
            done = {int(r["seed"]) for r in read(args.out) if (r["variant"], r["bits"], int(r["steps"])) == run}
            missing = [seed for seed in args.seeds if seed not in done]
            for start in range(0, len(missing), TOGETHER):
                some = json.dumps([*run, missing[start : start + TOGETHER]])
                append(args.out, COLUMNS, in_process("same", "--root", str(args.root), "--one", some))
        rows = [row for row in read(args.out) if int(row["steps"]) == args.steps]
        print("\n".join(table(rows, bits, variants, args.seeds)), flush=True)
    print(f"commits: {', '.join(sorted({row['commit'] for row in read(args.out)}))}")


if __name__ == "__main__":
    main()
