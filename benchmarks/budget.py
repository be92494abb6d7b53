"""What a step is worth in a unit and in the last epoch: `python -m benchmarks.budget --root FOLDER`.

ResNet-20 on CIFAR-10, at W2A2 unless asked otherwise, by the number of steps of each unit and of the last epoch: how
often the calibrated network agrees with its teacher on calibration images that no run has seen (the validation images
are left for the final number; a tenth more than 1024 is left out, which judges where a share is held out), and the
processor time of the whole fit in F, one forward pass over 1024 images. One thread, and processor time, so that other
jobs on the machine disturb little. Rows go to benchmarks/budget.csv, one for each run; the table has means over seeds,
of all rows at these bits, sorted by time, and `--plot` draws them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import lightning_ptq as ptq
from benchmarks.common import DEFAULT_ROOT, Yardstick, append, calibrate, commit, in_process, read, trained

# unit steps/last epoch's steps[/settle[/images held out, as a share]], the last two 0 and 0.1 if they are left out
POINTS = ("20/20", "50/50", "100/13", "100/100", "250/32", "200/200", "500/224", "2000/447")
COLUMNS = ("point", "images", "bits", "seed", "f_seconds", "f", "agreement", "commit")
# (images, point) -> F, mean and standard deviation of the agreement, runs.
Means = dict[tuple[str, str], tuple[float, float, float, int]]


def run(point: str, images: int, bits: str, seed: int, root: Path) -> dict[str, Any]:
    """One calibration in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parts = point.split("/")
    steps, network_steps, settle, held_out = (*parts, *("0", "0.1")[len(parts) - 2 :])
    data = ptq.ImageFolderData(str(root), resize=None, crop=None, calibration_samples=2050, seed=seed)
    data.setup("fit")
    drawn = data.calibration_images()
    seen, unseen = drawn[:1024], drawn[1024 + 102 :]  # those between them judge, where a tenth is held out
    yardstick = Yardstick(trained("resnet20", root), seen)
    mixed = bits.startswith("mixed")
    quant = ptq.QuantConfig(average_bits=float(bits[5:])) if mixed else ptq.QuantConfig(int(bits[1]), int(bits[3]))
    module = ptq.PTQModule(
        trained("resnet20", root),
        quant,
        steps_per_unit=int(steps),
        network_steps=int(network_steps),
        settle=float(settle),
        held_out=float(held_out),
        report=False,
        seed=seed,
    )
    passes = []
    for _ in range(5):
        start = time.process_time()
        yardstick.measure()
        passes.append(time.process_time() - start)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        # Draws the first of those above, since the seed is the same.
        read = {"resize": None, "crop": None, "calibration_samples": images, "seed": seed}
        calibrate(module, ptq.ImageFolderData(str(root), validation_folder=None, **read), folder)
        spent = time.process_time() - start
    with torch.no_grad():
        same = (module.eval()(unseen).argmax(1) == module.teacher(unseen).argmax(1)).double().mean()
    f = statistics.median(passes)
    found = {"f_seconds": round(f, 3), "f": round(spent / f, 1), "agreement": round(100 * float(same), 2)}
    return {"point": point, "images": images, "bits": bits, "seed": seed, **found, "commit": commit()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/ and teachers/")
    parser.add_argument("--points", nargs="+", default=POINTS, help="unit steps/last epoch's[/settle[/held_out]]")
    parser.add_argument("--images", type=int, nargs="+", default=[1024], help="that steps draw from")
    parser.add_argument("--bits", default="w2a2", help="or mixed3: as many bit operations as w3a3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/budget.csv"))
    parser.add_argument("--plot", type=Path, help="PNG of agreement against time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if max(args.images) > 1024:
        parser.error("--images: at most 1024, the others tell what was learned")
    if args.one:
        print(json.dumps(run(**json.loads(args.one), root=args.root)))
        return
    rows = read(args.out)
    for seed, images, point in itertools.product(args.seeds, args.images, args.points):
        asked = {"point": point, "images": images, "bits": args.bits, "seed": seed}
        if any(all(row[key] == str(value) for key, value in asked.items()) for row in rows):
            continue
        row = in_process("budget", "--root", str(args.root), "--one", json.dumps(asked))
        append(args.out, COLUMNS, [row])
        rows.append({key: str(value) for key, value in row.items()})
    found = means([row for row in rows if row["bits"] == args.bits])
    print(f"{'images':<7} {'steps/last epoch':<18} {'F':>6} {'agreement':>10}")
    for (images, point), (f, rate, spread, count) in found.items():
        print(f"{images:<7} {point:<18} {f:>6.1f} {rate:>10.2f} ± {spread:.2f} ({count})")
    if args.plot:
        plot(found, args.plot)


def means(rows: list[dict[str, str]]) -> Means:
    """What each point came to, over seeds; the quickest first."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["images"], row["point"]), []).append(row)
    found: Means = {}
    for point, mine in groups.items():
        rates, passes = ([float(row[key]) for row in mine] for key in ("agreement", "f"))
        spread = statistics.stdev(rates) if len(rates) > 1 else 0.0
        found[point] = statistics.mean(passes), statistics.mean(rates), spread, len(rates)
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def plot(found: Means, path: Path) -> None:
    """Agreement against time, a line for each number of images; points with options of their own are left out."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for images in sorted({images for images, _ in found}, key=int):
        mine = [value for (known, point), value in found.items() if known == images and point.count("/") == 1]
        f, rates, spreads = ([value[i] for value in mine] for i in range(3))
        axes.errorbar(f, rates, spreads, marker="o", capsize=3, label=f"{images} images")
    axes.set(xscale="log", xlabel="F, forward passes over 1024 images", ylabel="agreement with the teacher, %")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
