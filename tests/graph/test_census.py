"""Small models of the census (`benchmarks/census.py`), one of every kind: captured, cut, calibrated, evaluated."""

import pytest

from benchmarks.census import go

pytest.importorskip("timm")

# torchvision's through torch.export and fx; of timm a ViT, windows, convolutions with attention, gates, and mixers.
WAYS = {
    "swin_t": "export",
    "timm:deit_tiny_patch16_224": "fx",
    "timm:efficientvit_b0": "export",
    "timm:levit_128s": "fx",
    "timm:mobilevitv2_050": "export",
    "timm:mobilenetv4_conv_small": "fx",
    "timm:edgenext_xx_small": "fx",
}


@pytest.mark.parametrize("name", WAYS)
def test_a_model_goes_in_as_it_is(name):
    row = go(name)
    assert row["passed"], row
    assert row["way"] == WAYS[name]
    assert row["share"] >= 99.0, row
    assert row["units"] > 4, row
