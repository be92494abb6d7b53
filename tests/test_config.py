"""Settings are refused where they are made, with the value, the rule and the way out."""

from dataclasses import replace
from typing import Any

import pytest

from lightning_ptq import ContrastiveConfig, Method, PTQError, QuantConfig
from lightning_ptq.config import LayerBits
from lightning_ptq.graph.placement import bits_read
from lightning_ptq.methods import METHODS, default_rates, get_method


@pytest.mark.parametrize("bits", [1, 0, 9, 16, -4, 4.0, True, "4"])
def test_weight_bits_outside_2_to_8_are_refused(bits: object) -> None:
    with pytest.raises(PTQError, match=r"weight_bits=.*Use 2 to 8\."):
        QuantConfig(weight_bits=bits)


@pytest.mark.parametrize("bits", [1, 9, 15, 32])
def test_act_bits_outside_2_to_8_and_16_are_refused(bits: int) -> None:
    with pytest.raises(PTQError, match=r"act_bits=.*Use 2 to 8, or 16\."):
        QuantConfig(act_bits=bits)


@pytest.mark.parametrize("option", ["weight_per", "weight_range", "act_range", "edges", "placement"])
def test_unknown_options_are_refused_with_the_choices(option: str) -> None:
    with pytest.raises(PTQError, match=rf"{option}='nonsense' is unknown\. Choose one of"):
        QuantConfig(**{option: "nonsense"})


def test_overrides_are_checked() -> None:
    with pytest.raises(PTQError, match=r"overrides\['fc'\]='bits' is unknown"):
        QuantConfig(overrides={"fc": {"bits": 4}})
    with pytest.raises(PTQError, match=r"overrides\['fc'\]\.weight_bits=1"):
        QuantConfig(overrides={"fc": {"weight_bits": 1}})
    config = QuantConfig(overrides={"layer?.*": {"weight_bits": 8}})
    config.check_overrides(["conv1", "layer1.0.conv1"])
    with pytest.raises(PTQError, match=r"'layer\?\.\*' matches none of the 2 quantized layers"):
        config.check_overrides(["conv1", "fc"])


def test_bits_follow_edges_and_the_last_matching_override() -> None:
    config = QuantConfig(2, 4, overrides={"layer1.*": {"act_bits": 8}, "*.conv2": {"weight_bits": 3, "act_bits": 16}})
    assert config.bits_of("layer2.0.conv1", first=False, last=False).weight_bits == 2
    assert config.bits_of("conv1", first=True, last=False).weight_bits == 8
    assert config.bits_of("fc", first=False, last=True).act_bits == 8
    assert config.bits_of("layer1.0.conv1", first=False, last=False).act_bits == 8
    bits = config.bits_of("layer1.0.conv2", first=True, last=False)
    assert (bits.weight_bits, bits.act_bits) == (3, 16)
    assert QuantConfig(2, 4, edges="same").bits_of("conv1", first=True, last=False).weight_bits == 2


def test_what_several_read_has_the_bits_that_one_was_given_or_else_the_most() -> None:
    given, default = LayerBits(4, 3, frozenset({"act_bits"})), LayerBits(4, 8, frozenset({"weight_bits"}))
    assert bits_read([given, default], mixed=False) == 8
    assert bits_read([given, default], mixed=True) == 3
    assert bits_read([default, LayerBits(4, 4)], mixed=True) == 8


def test_mixed_precision_leaves_edges_and_what_overrides_name() -> None:
    config = QuantConfig(overrides={"layer1.*": {"act_bits": 8}, "*.conv2": {"weight_bits": 3}})
    assert config.bits_of("layer2.0.conv1", first=False, last=False).fixed == frozenset()
    assert config.bits_of("layer1.0.conv1", first=False, last=False).fixed == {"act_bits"}
    assert config.bits_of("layer1.0.conv2", first=False, last=False).fixed == {"act_bits", "weight_bits"}
    assert config.bits_of("conv1", first=True, last=False).fixed == {"act_bits", "weight_bits"}
    assert QuantConfig(edges="same").bits_of("conv1", first=True, last=False).fixed == frozenset()


def test_presets_are_points_and_coordinates_replace_theirs() -> None:
    assert METHODS["adaround"].granularity == "layer"
    assert METHODS["adaround"].scales == "none"
    assert METHODS["brecq"].scales == "after"
    qdrop: dict[str, Any] = {"input": "mix", "rounding": "adaround", "scales": "joint", "weighting": "fisher"}
    qdrop |= {"drop_until": 0.8, "corrections": True}
    assert METHODS["qdrop"] == Method(**qdrop, drop=0.5)
    assert METHODS["pdquant"] == replace(METHODS["qdrop"], prediction=0.1)
    assert not METHODS["nearest"].learns
    assert get_method("qdrop", granularity="net", drop=0.25) == Method(**qdrop, granularity="net", drop=0.25)


def test_unknown_presets_and_coordinates_are_refused() -> None:
    with pytest.raises(PTQError, match=r"method='quick' is unknown\. Choose one of 'nearest', 'adaround'"):
        get_method("quick")
    with pytest.raises(PTQError, match="granularity='pixel' is unknown"):
        get_method("qdrop", granularity="pixel")
    with pytest.raises(PTQError, match=r"drop=1\.0"):
        get_method("qdrop", drop=1.0)
    with pytest.raises(PTQError, match=r"drop_until=1\.5 is no share"):
        get_method("qdrop", drop_until=1.5)
    with pytest.raises(PTQError, match=r"prediction=-1\.0"):
        get_method("qdrop", prediction=-1.0)
    with pytest.raises(PTQError, match="mixes nothing"):
        get_method("qdrop", drop=0.0)
    with pytest.raises(PTQError, match="temperature=0"):
        ContrastiveConfig(temperature=0)
    with pytest.raises(PTQError, match="negatives='bank' holds whole images and feature='positions'"):
        ContrastiveConfig(negatives="bank")
    with pytest.raises(PTQError, match="tail_units=2 needs feature='tail'"):
        ContrastiveConfig(tail_units=2)
    with pytest.raises(PTQError, match=r"positions=2\.5 must be a whole number, 2 or more"):
        ContrastiveConfig(positions=2.5)
    with pytest.raises(PTQError, match=r"distribution_steps=0\.5 must be a whole number"):
        get_method("pdquant", distribution_steps=0.5)
    with pytest.raises(PTQError, match="distribution_steps=5 corrects what is mixed into a unit's input"):
        get_method("brecq", distribution_steps=5)
    with pytest.raises(PTQError, match="contrastive loss='triplet'"):
        ContrastiveConfig(loss="triplet")


def test_rates_shrink_with_the_budget_and_meet_the_papers() -> None:
    rounding, scales = default_rates(20_000)
    assert rounding == pytest.approx(1e-3)
    rates = [default_rates(steps) for steps in (100, 250, 500, 1000, 2000, 20_000)]
    assert rates == sorted(rates, reverse=True)
    assert scales == min(s for _, s in rates)


def test_rate_factors_follow_the_schedule() -> None:
    assert METHODS["adaround"].rate_factors(0.0) == (1.0, 0.0)
    assert METHODS["qdrop"].rate_factors(0.0) == (1.0, 1.0)
    assert METHODS["qdrop"].rate_factors(0.5) == pytest.approx((1.0, 0.5))
    assert METHODS["brecq"].rate_factors(0.4) == (1.0, 0.0)
    assert METHODS["brecq"].rate_factors(0.8) == (0.0, 1.0)
    assert METHODS["brecq"].rate_factors(0.999)[1] < 1e-4
    assert METHODS["brecq"].rounding_progress(0.8) == 1.0
    assert METHODS["flexround"].rate_factors(0.5) == pytest.approx((0.5, 0.5))
    assert get_method("flexround", scales="after").rate_factors(0.4) == pytest.approx((0.5, 0.0))
    assert get_method("flexround", scales="none").rate_factors(0.5) == pytest.approx((0.5, 0.0))
