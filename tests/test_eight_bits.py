"""Eight bits are tried before anything is calibrated, and what they can't hold is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQError, QuantConfig
from lightning_ptq.eight_bits import EightBits, eight_bits, images_to_try
from lightning_ptq.graph import ChainPair, build_chain
from lightning_ptq.quantizers import act_quantizers, weight_quantizers
from tests.helpers import tiny_images, tiny_net

CPU = torch.device("cpu")
QUANT = QuantConfig(weight_bits=2, act_bits=2)


def chains(net: nn.Module) -> ChainPair:
    return build_chain(net.eval(), QUANT, "block")


def test_a_sound_network_survives_and_is_left_as_it_was() -> None:
    pair = chains(tiny_net())
    before = {name: value.clone() for name, value in pair.student.state_dict().items()}
    found = eight_bits(pair, tiny_images(64), QUANT, CPU)
    assert found.survives
    assert found.agreement is not None
    assert found.agreement >= 97
    assert not found.causes
    assert found.text().count("\n") == 0
    assert ", 64 images: " in found.text(of=64)
    assert ", 64 of 300 images for a quick look: " in found.text(of=300)
    assert all(torch.equal(value, before[name]) for name, value in pair.student.state_dict().items() if "ready" in name)
    inner = [q.bits for q in (*act_quantizers(pair.student), *weight_quantizers(pair.student))]
    assert 2 in inner
    assert not any(q.enabled for q in weight_quantizers(pair.student))


class Outlier(nn.Module):
    """One channel between the second and the third layer is a thousand times as large as all others together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)
        with torch.no_grad():
            self.b.weight[0] *= 3000
            self.c.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(self.b(torch.relu(self.a(x)))))
        return self.fc(x.mean((2, 3)))


def test_the_tensor_that_eight_bits_cannot_hold_is_named() -> None:
    found = eight_bits(chains(Outlier()), tiny_images(64), QUANT, CPU)
    assert not found.survives
    name, share = found.causes[0]
    assert name == "what 'c' reads"
    assert share > 0.9
    assert "warning" in found.text()
    assert "What costs most: what 'c' reads (" in found.text()


def test_the_advice_of_the_warning_cures_it() -> None:
    advised = QuantConfig(weight_bits=2, act_bits=2, overrides={"c": {"act_bits": 16}})
    before, after = (
        eight_bits(build_chain(Outlier().eval(), quant, "block"), tiny_images(64), quant, CPU)
        for quant in (QUANT, advised)
    )
    assert before.sqnr_db < 25
    assert after.sqnr_db > 40


def test_large_images_are_few() -> None:
    assert [images_to_try(shape) for shape in ((1, 8, 8), (3, 224, 224), (3, 448, 448), (3, 800, 1088))] == [
        64,
        64,
        16,
        4,
    ]


def test_without_classes_the_noise_decides() -> None:
    assert EightBits(None, 25.0, 8, ()).survives
    assert not EightBits(None, 15.0, 8, ()).survives
    assert not EightBits(96.0, 60.0, 8, ()).survives
    assert "agreement" not in EightBits(None, 25.0, 8, ()).text()


def test_a_network_with_ranges_is_refused() -> None:
    pair = chains(tiny_net())
    weight_quantizers(pair.student)[0].enabled = True
    with pytest.raises(PTQError, match="before calibration"):
        eight_bits(pair, tiny_images(8), QUANT, CPU)
