"""The paragraph follows from the run's numbers: each planted case is named, with the option that answers it."""

from __future__ import annotations

import inspect
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from lightning_ptq import ImageFolderData, PTQModule, QuantConfig
from lightning_ptq.report.advice import advice
from lightning_ptq.report.run import Run


def unit(name: str, sqnr_db: float | None, **changes: Any) -> dict[str, Any]:
    return {"name": name, "sqnr_db": sqnr_db, "flipped_fraction": 0.1, "accepted": True} | changes


def layer(name: str, weight_db: float, bits: int = 4) -> dict[str, Any]:
    return {"name": name, "unit": name, "reads": f"act_{name}", "weight_bits": bits, "act_bits": bits,
            "grid": {"sqnr_db": weight_db}}  # fmt: skip


def run(record: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A finished W4A4 run without anything to complain of: each unit adds the same noise."""
    summary = {
        "method": "qdrop", "contrastive": False, "weight_bits": 4, "act_bits": 4, "complete": True, "accepted": True,
        "teacher_top1": 90.0, "nearest_top1": 80.0, "student_top1": 88.0, "teacher_agreement": 95.0,
        "nearest_agreement": 85.0, "calibration_samples": 1000, "steps_per_unit": 500, "calibration_agreement": 95.5,
        "units": [unit("a", 30.0), unit("b", 20.0), unit("c", 19.0)],
        "settings": {"rounding_lr": 0.1, "scale_lr": 0.01, "network_lr": 0.004},
    }  # fmt: skip
    layers = [layer(name, 20.0) for name in "abc"]
    activations = {f"act_{name}": {"sqnr_db": 25.0, "clipped_fraction": 0.0} for name in "abc"}
    told = {"layers": layers, "activations": activations, "epochs": ["a", "b", "c"], "curves": {}}
    told["confusion"] = {"student": {"images": 1000}}
    return Run(Path("run"), summary | changes, told | (record or {}))


def test_the_outcome_is_what_was_won_back() -> None:
    assert "reaches 88.00 % top-1; the teacher has 90.00, and 80 % of what rounding to nearest loses" in advice(run())
    assert "rounding to nearest 89.00." in advice(run(nearest_top1=89.0))
    dense = dict.fromkeys(("teacher_top1", "nearest_top1", "student_top1", "teacher_agreement", "nearest_agreement"))
    assert "14.0 dB above its noise; rounded to nearest it is 9.0 dB" in advice(
        run(**dense, student_sqnr_db=14.0, nearest_sqnr_db=9.0)
    )
    assert "was not compared with anything" in advice(run(**dense))


@pytest.mark.parametrize(("worst", "db"), [("a", (10.0, 9.9, 9.8)), ("b", (30.0, 10.0, 9.9)), ("c", (30.0, 25.0, 8.0))])
def test_the_unit_that_adds_most_noise_is_named(worst: str, db: tuple[float, ...]) -> None:
    text = advice(run(units=[unit(name, value) for name, value in zip("abc", db, strict=True)]))
    assert f"'{worst}' costs most" in text
    assert f"""`--model.quant.overrides '{{"{worst}": {{"weight_bits": 8}}}}'`""" in text
    assert text.count("costs most") == 1


def test_the_tensor_that_loses_most_is_the_one_to_give_bits() -> None:
    activations = {f"act_{name}": {"sqnr_db": 12.34, "clipped_fraction": 0.05} for name in "abc"}
    text = advice(run({"activations": activations}))
    assert "what is read by 'b', 12.3 dB at 4 bits (5 % of its values lie beyond the range)" in text
    assert '{"b": {"act_bits": 8}}' in text
    assert "weight_bits" not in text
    two = advice(run({"layers": [layer(name, 5.0, bits=2) for name in "abc"]}))
    assert '{"b": {"weight_bits": 3}}' in two
    eight = advice(run({"layers": [layer(name, 5.0, bits=8) for name in "abc"]}))
    assert "with 8 bits already" in eight
    assert "overrides" not in eight


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "not finished": ({"complete": False}, "not finished, 3 of 3 epochs are done"),
    "all put back": ({"accepted": False}, "give more images (`--data.calibration_samples 2000`) or halve the learning"),
    "one unit put back": (
        {"units": [unit("a", 30.0, accepted=False), unit("b", 20.0)]},
        "'a' was put back, since calibration raised the error",
    ),
    "last epoch undone": (
        {"units": [unit("a", 30.0), unit("whole-network", 20.0, accepted=False)]},
        "`--model.network_lr 0.002`",
    ),
    "little to gain": ({"teacher_agreement": 99.8}, "fewer bits are worth trying (`--model.quant.weight_bits 3`"),
    "overfit": (
        {"teacher_agreement": 90.0, "calibration_agreement": 97.0},
        "7.0 points more often on the images it was calibrated with than on others (standard error 1.1)",
    ),
    "many flipped": ({"units": [unit("a", 30.0, flipped_fraction=0.45)]}, "In 'a' 45 % of the weights"),
    "nothing learned": ({"method": "nearest"}, "`--model.method qdrop` learns the rounding"),
    "two bits": ({"weight_bits": 2, "act_bits": 2}, "`--model.contrastive true`"),
    "contrastive in vain": ({"contrastive": True}, "`--model.contrastive false`"),
    "old method": ({"method": "brecq", "act_bits": 3}, "`--model.method qdrop` mixes in the teacher's"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), CASES.values(), ids=CASES.keys())
def test_a_planted_case_is_told_and_only_where_it_is(changes: dict[str, Any], said: str) -> None:
    assert said in advice(run(**changes))
    assert said not in advice(run())


@pytest.mark.parametrize("bits", [(2, 4), (4, 2), (3, 3)])
def test_the_contrastive_term_is_advised_where_it_has_paid_alone(bits: tuple[int, int]) -> None:
    assert "--model.contrastive true" not in advice(run(weight_bits=bits[0], act_bits=bits[1]))
    assert "--model.contrastive false" in advice(run(weight_bits=bits[0], act_bits=bits[1], contrastive=True))
    assert "contrastive" not in advice(run(weight_bits=2, act_bits=2, contrastive=True)).partition(".")[2]


def test_a_gap_that_few_images_explain_is_no_advice() -> None:
    gap: dict[str, Any] = {"teacher_agreement": 90.0, "calibration_agreement": 95.0}
    for images, said in ((200, False), (2000, True)):
        record = {"confusion": {"student": {"images": images}}}
        assert ("more often" in advice(run(record, calibration_samples=images, **gap))) == said
    assert "more often" not in advice(run({"confusion": {}}, **gap))


def test_no_more_images_are_asked_of_a_folder_than_it_has() -> None:
    assert "give more images than the 300 that there are or halve" in advice(
        run(accepted=False, calibration_samples=300, images_available=300)
    )
    assert "more images than the 290 that there are" in advice(
        run(accepted=False, calibration_samples=290, images_available=300, skipped_images={"calibration": 10})
    )
    assert "`--data.calibration_samples 400`" in advice(
        run(accepted=False, calibration_samples=300, images_available=400)
    )


def test_overrides_that_a_run_had_are_kept() -> None:
    had = {"overrides": {"a": {"weight_bits": 8}, "b": {"act_bits": 8}}}
    kept = '{"a": {"weight_bits": 8}, "b": {"act_bits": 8, "weight_bits": 8}}'
    assert f"--model.quant.overrides '{kept}'" in advice(run(quant=had))


def test_options_are_what_the_terminal_takes() -> None:
    module, quant, data = (inspect.signature(kind).parameters for kind in (PTQModule, QuantConfig, ImageFolderData))
    known = {f"--model.{key}" for key in module} | {f"--model.quant.{key}" for key in quant}
    known |= {f"--data.{key}" for key in data} | {"--ckpt_path"}
    pasted = [part for changes, _ in CASES.values() for part in advice(run(**changes)).split("`")[1::2]]
    assert len(pasted) > len(CASES)
    for option, value in map(shlex.split, pasted):
        assert option in known
        if option.endswith("overrides"):
            QuantConfig(overrides=json.loads(value))


def test_a_unit_that_was_still_learning_gets_more_steps() -> None:
    falling, flat = [100.0 - 5 * step for step in range(16)], [100.0] * 16
    text = advice(run({"curves": {"b": {"step": [*range(16)], "reconstruction": falling}}}))
    assert "`--model.steps_per_unit 1000` goes on" in text
    assert "steps_per_unit" not in advice(run({"curves": {"b": {"step": [*range(16)], "reconstruction": flat}}}))


def test_eight_bit_layers_may_flip() -> None:
    units = [unit("a", 30.0, flipped_fraction=0.45)]
    assert "45 %" not in advice(run({"layers": [layer("a", 40.0, bits=8)]}, units=units))


def test_an_older_run_without_a_record_is_advised_too() -> None:
    assert "'b' costs most" in advice(Run(Path("run"), run().summary, {}))
