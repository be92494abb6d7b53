"""Small models of the census (`benchmarks/census.py`), one of every kind: captured, cut, calibrated, evaluated."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from benchmarks.census import random_model, row

pytest.importorskip("timm")


def swin() -> nn.Module:
    """Half of swin_t: blocks with and without shifted windows, and such where one window is the whole image."""
    torch.manual_seed(0)
    return SwinTransformer([8, 8], 96, [2, 2, 2], [3, 6, 12], [7, 7]).eval()


def mobilevit() -> nn.Module:
    """With one transformer block at each of three sizes."""
    model = random_model("timm:mobilevitv2_050")
    for module in model.modules():
        if isinstance(blocks := getattr(module, "transformer", None), nn.Sequential):
            del blocks[1:]
    return model


# torchvision's through torch.export and fx; of timm a ViT, windows, convolutions with attention, gates, and mixers.
# Some repeat a block less often than in the census.
MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "swin": ("export", swin),
    "deit": ("fx", partial(random_model, "timm:deit_tiny_patch16_224", depth=4)),
    "efficientvit": ("export", partial(random_model, "timm:efficientvit_b0", depths=(1, 2, 2, 2, 1))),
    "levit": ("fx", partial(random_model, "timm:levit_128s", depth=(2, 2, 2))),
    "mobilevitv2": ("export", mobilevit),
    "mobilenetv4": ("fx", partial(random_model, "timm:mobilenetv4_conv_small")),
    "edgenext": ("fx", partial(random_model, "timm:edgenext_xx_small")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_goes_in_as_it_is(name: str) -> None:
    way, build = MODELS[name]
    found = row(build())
    assert found["passed"], found
    assert found["way"] == way
    assert found["share"] >= 99.0, found
    assert found["units"] > 4, found
