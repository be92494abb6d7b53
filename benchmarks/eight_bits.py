"""Eight bits, rounded to nearest, on every classification model of torchvision: `python -m benchmarks.eight_bits`.

The models are untrained, but their batch norms have the statistics of real images: crops of scikit-learn's two photos,
small ones, since it is the number of images that counts. Other crops are looked at. A row says how often student and
teacher agree, and what `plan` warns of where that is little. Rows are added to benchmarks/eight_bits.csv; the table is
printed.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.census import random_model
from benchmarks.common import complete, in_process
from lightning_ptq import QuantConfig
from lightning_ptq.eight_bits import LEAST_AGREEMENT, eight_bits
from lightning_ptq.graph import build_chain
from lightning_ptq.metrics import decibels, signal_and_noise

COLUMNS = ("model", "agreement", "sqnr_db", "classes", "warned", "seconds", "causes")
WIDTHS = dict(zip(COLUMNS, (22, 9, 8, 8, 7, 8, 1), strict=True))
IMAGES = 64
# Pixels of a side, where 64 are too few or the model is made for a number of its own.
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_b_32": 96, "vit_l_32": 96, "vit_h_14": 56}


def crops(count: int, size: int, seed: int) -> Tensor:
    """(count, 3, size, size): random crops of two photos, normalised as for ImageNet."""
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 255 for photo in load_sample_images().images]
    generator, found = torch.Generator().manual_seed(seed), []

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for i in range(count):
        photo = photos[i % len(photos)]
        side = draw(size, min(photo.shape[1:]))
        top, left = draw(0, photo.shape[1] - side), draw(0, photo.shape[2] - side)
        crop = photo[None, :, top : top + side, left : left + side]
        crop = crop.flip(3) if draw(0, 1) else crop
        found.append(nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.cat(found) - mean) / std


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> None:
    """Give batch norms the statistics of their inputs for these images."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        model(images)
    model.eval()


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    """The untrained network with settled batch norms, and other crops."""
    size = SIZES.get(name, 112 if name.startswith("vit") else 64)
    model = random_model(name, **({"image_size": size} if name.startswith("vit") else {}))
    settle(model, crops(IMAGES, size, seed=1))
    return model, crops(IMAGES, size, seed=2)


@torch.no_grad()
def disturbed(name: str, decibels_in: float = 50.0) -> float:
    """SQNR in dB of the float network's output where white noise of so many dB is added to its images."""
    model, images = prepared(name)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noise *= (images.square().mean() / 10 ** (decibels_in / 10)).sqrt()
    return decibels(*signal_and_noise(model(images + noise), model(images)).tolist())


def go(name: str) -> dict[str, Any]:
    """The row of one model."""
    warnings.simplefilter("ignore")
    start = time.monotonic()
    model, images = prepared(name)
    with torch.no_grad():
        predicted = torch.cat([model(x) for x in images.split(16)]).argmax(1)
    chains = build_chain(model, QuantConfig(), "block", image_shape=images.shape[1:])
    del model
    found = eight_bits(chains, images, QuantConfig(), torch.device("cpu"))
    assert found.agreement is not None
    return {
        "model": name,
        "agreement": round(found.agreement, 1),
        "sqnr_db": round(found.sqnr_db, 1),
        "classes": len(predicted.unique()),
        "warned": not found.survives,
        "seconds": round(time.monotonic() - start, 1),
        "causes": "; ".join(f"{tensor} {100 * share:.0f} %" for tensor, share in found.causes[:3]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/eight_bits.csv"))
    parser.add_argument("--disturb", action="store_true", help="instead: what 50 dB of noise on the images become")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(go(args.one)))
        return
    names = args.models or torchvision.models.list_models(module=torchvision.models)
    if args.disturb:
        for name in names:
            print(f"{name:<22} {disturbed(name):5.1f} dB", flush=True)
        return
    rows = complete(args.out, COLUMNS, names, lambda name: [in_process("eight_bits", "--one", name)])
    for row in rows:
        print("  ".join(f"{row[column]:<{width}}" for column, width in WIDTHS.items()))
    well = sum(float(row["agreement"]) >= LEAST_AGREEMENT for row in rows)
    warned = sum(row["warned"] == "True" for row in rows)
    print(f"{len(rows)} models: {well} agree in {LEAST_AGREEMENT:g} % or more, `plan` warns of {warned}")


if __name__ == "__main__":
    main()
