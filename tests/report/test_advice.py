"""The paragraph follows from the run's numbers: each planted case is named, with the option that answers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
        "nearest_agreement": 85.0, "calibration_samples": 1000, "steps_per_unit": 500, "overfit_gap": 0.5,
        "units": [unit("a", 30.0), unit("b", 20.0), unit("c", 19.0)],
        "settings": {"rounding_lr": 0.1, "scale_lr": 0.01, "network_lr": 0.004},
    }  # fmt: skip
    layers = [layer(name, 20.0) for name in "abc"]
    activations = {f"act_{name}": {"sqnr_db": 25.0, "clipped_fraction": 0.0} for name in "abc"}
    told = {"layers": layers, "activations": activations, "epochs": ["a", "b", "c"], "curves": {}}
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
    assert f'`quant.overrides={{"{worst}": {{"weight_bits": 8}}}}`' in text
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
    "all put back": ({"accepted": False}, "`data.calibration_samples=2000`) or halve the learning rates"),
    "one unit put back": (
        {"units": [unit("a", 30.0, accepted=False), unit("b", 20.0)]},
        "'a' was put back, since calibration raised the error",
    ),
    "last epoch undone": (
        {"units": [unit("a", 30.0), unit("whole-network", 20.0, accepted=False)]},
        "`network_lr=0.002`",
    ),
    "little to gain": ({"teacher_agreement": 99.8}, "fewer bits are worth trying (`quant.weight_bits=3`"),
    "learned by heart": ({"overfit_gap": 7.0}, "7.0 points more often on the images it was calibrated with"),
    "many flipped": ({"units": [unit("a", 30.0, flipped_fraction=0.45)]}, "In 'a' 45 % of the weights"),
    "nothing learned": ({"method": "nearest"}, "`method=qdrop` learns the rounding"),
    "two bits": ({"weight_bits": 2}, "`contrastive=true`"),
    "contrastive in vain": ({"contrastive": True}, "`contrastive=false`"),
    "old method": ({"method": "brecq", "act_bits": 3}, "`method=qdrop` mixes in the teacher's"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), CASES.values(), ids=CASES.keys())
def test_a_planted_case_is_told_and_only_where_it_is(changes: dict[str, Any], said: str) -> None:
    assert said in advice(run(**changes))
    assert said not in advice(run())


def test_a_unit_that_was_still_learning_gets_more_steps() -> None:
    falling, flat = [100.0 - 5 * step for step in range(16)], [100.0] * 16
    text = advice(run({"curves": {"b": {"step": [*range(16)], "reconstruction": falling}}}))
    assert "`steps_per_unit=1000` goes on" in text
    assert "steps_per_unit" not in advice(run({"curves": {"b": {"step": [*range(16)], "reconstruction": flat}}}))


def test_eight_bit_layers_may_flip() -> None:
    units = [unit("a", 30.0, flipped_fraction=0.45)]
    assert "45 %" not in advice(run({"layers": [layer("a", 40.0, bits=8)]}, units=units))


def test_an_older_run_without_a_record_is_advised_too() -> None:
    assert "'b' costs most" in advice(Run(Path("run"), run().summary, {}))
