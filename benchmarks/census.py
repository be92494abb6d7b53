"""Which vision models go in as they are: `python -m benchmarks.census --out benchmarks/census.csv`.

Every classification model of torchvision and one small model of each family of timm, untrained, each in a process of
its own: built, captured, folded, quantized, cut; the first unit calibrated for a step; evaluated rounded to nearest. A
row is added for each model that the CSV lacks, and the table is printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from torch import nn

import lightning_ptq as ptq
from benchmarks.common import complete, in_process
from lightning_ptq import QuantConfig
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.arithmetic import multiply_adds
from lightning_ptq.graph.capture import likely_image_shape
from lightning_ptq.graph.trace import words
from lightning_ptq.quantizers import initial_ranges

COLUMNS = ("model", "passed", "way", "units", "layers", "products", "share", "gmacs", "error", "seconds", "reason")
# One of each family, a small one that says something about it.
TIMM = words(
    "beit_base_patch16_224 botnet26t_256 gcresnet33ts cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 "
    "convnext_atto crossvit_tiny_240 cspresnet50 davit_tiny deit_tiny_patch16_224 densenet121 dla34 dpn48b "
    "edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvit_b0 efficientvit_m0 "
    "eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_a "
    "hgnetv2_b0 hiera_tiny_224 hrnet_w18_small inception_next_atto inception_v4 lcnetv2_small levit_128s "
    "mambaout_femto coatnet_0_rw_224 maxvit_rmlp_pico_rw_256 caformer_s18 poolformer_s12 mixer_s32_224 "
    "mobilenetv3_small_050 mobilenetv4_conv_small mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small "
    "nf_resnet50 pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2net50_26w_4s resnest14d "
    "resnet18 resnetv2_50 rexnet_100 selecsls42b legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s1 "
    "swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 "
    "tnt_s_patch16_224 tresnet_m twins_svt_small visformer_tiny vit_tiny_patch16_224 vit_small_r26_s32_224 "
    "vit_relpos_small_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_dw xception41 xcit_nano_12_p16_224"
)
# Parameters of a model whose numbers are not checked again in float64, for want of memory.
_LARGE = 150_000_000
WIDTHS = dict(zip(COLUMNS, (42, 6, 8, 6, 7, 8, 7, 8, 8, 8, 1), strict=True))


def names() -> list[str]:
    """Every model's name; those of timm begin with "timm:"."""
    return [*torchvision.models.list_models(module=torchvision.models), *(f"timm:{name}" for name in sorted(TIMM))]


def random_model(name: str, **options: Any) -> nn.Module:
    """The untrained model, made with these `options`, in eval mode, without a layer that is all zeros."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        import timm

        model = timm.create_model(name.removeprefix("timm:"), pretrained=False, **options)
    else:
        options |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def smooth_images(count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Random images (count, C, H, W) with some structure."""
    return nn.functional.interpolate(torch.randn(count, shape[0], 8, 8), shape[1:], mode="bilinear")


@torch.no_grad()
def settle(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Give batch norms the statistics of their inputs for random images."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        model(smooth_images(4, shape))
    model.eval()


def deviation(model: nn.Module, images: torch.Tensor) -> float:
    """Largest deviation of the chain from the model, of what the image changes; in float64, for some are chaotic."""
    model, images = deepcopy(model).double(), images[:2].double()
    with torch.no_grad():
        expected, actual = model(images), build_chain(model, QuantConfig(), "block").teacher(images)
    return float((actual - expected).abs().max() / (expected[0] - expected[1]).abs().max())


def go(name: str) -> dict[str, Any]:
    """The row of one model."""
    warnings.simplefilter("ignore")
    return row(random_model(name))


def row(model: nn.Module) -> dict[str, Any]:
    """The same of a model that is there already."""
    start = time.monotonic()
    shape = likely_image_shape(model)
    settle(model, shape)
    images = smooth_images(4, shape)
    with torch.no_grad():
        expected = model(images)
    error = deviation(model, images) if sum(p.numel() for p in model.parameters()) < _LARGE else None
    module = ptq.PTQModule(
        model, method="adaround", granularity="block", steps_per_unit=1, batch_size=2, seed=0, report=False
    )
    del model
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=ptq.CalibrationDataModule.from_loaders([images], calibration_samples=4))
    with torch.no_grad(), initial_ranges(module.student):
        nearest = module(images)
    if not bool(nearest.isfinite().all()) or nearest.shape != expected.shape:
        raise RuntimeError("rounded to nearest, the network gives NaN or infinity")
    quantized, total = multiply_adds(module.student, shape)
    islands = ", ".join(module.chains.islands)
    return {
        "passed": error is None or error < 1e-5,
        "way": "islands" if islands else "fx" if module.teacher.image_shape is None else "export",
        "units": len(module.student),
        "layers": len(module.chains.layers),
        "products": len(module.chains.products),
        "share": round(100 * quantized / total, 2),
        "gmacs": round(total / 1e9, 3),
        "error": "" if error is None else f"{error:.1e}",
        "seconds": round(time.monotonic() - start, 1),
        "reason": islands,
    }


def row_of(name: str, limit: float) -> dict[str, Any]:
    """The same in a process of its own; what it died of, if it did."""
    try:
        return {"model": name} | in_process("census", "--one", name, limit=limit)
    except RuntimeError as error:
        return {"model": name, "passed": False, "reason": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/census.csv"))
    parser.add_argument("--limit", type=float, default=600, help="seconds for one model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(go(args.one)))
        return
    rows = complete(args.out, COLUMNS, args.models or names(), lambda name: [row_of(name, args.limit)])
    for row in rows:
        print("  ".join(f"{row[column]:<{width}}" for column, width in WIDTHS.items()))
    for source in ("torchvision", "timm"):
        found_here = [row for row in rows if row["model"].startswith("timm:") == (source == "timm")]
        passed = [row for row in found_here if row["passed"] == "True"]
        least = min((float(row["share"]) for row in passed), default=0.0)
        print(f"{source}: {len(passed)} of {len(found_here)} pass; at least {least} % of multiply-adds quantized")


if __name__ == "__main__":
    main()
