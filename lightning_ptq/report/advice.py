"""What to try next, in plain words: rules over the numbers of one run, the most pressing first.

Options stand in backticks, as the terminal takes them.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from typing import Any

from lightning_ptq.network import NETWORK
from lightning_ptq.report.run import Run, costliest, decibels_of

# Sentences of advice, at most.
_MOST = 4
# Percent of images that agree with the teacher, and above which little is left to gain.
_GOOD = 99.5
# Points of agreement that calibration images may have above others; within two standard errors it may be more.
_GAP = 2.0
# Share of a unit's weights not rounded to nearest, above which it has fitted its images rather than its weights.
_FLIPPED = 0.3
# What the last quarter of a unit's steps may still take off its error.
_STILL_FALLING = 0.1
# Share of an activation beyond its range.
_CLIPPED = 0.02


def advice(run: Run) -> str:
    """One paragraph: how the run did, what costs most, and which options to change."""
    return " ".join([outcome(run), *list(suggestions(run))[:_MOST]])


def outcome(run: Run) -> str:
    """How much of what rounding to nearest loses was won back."""
    s = run.summary
    for teacher, nearest, student, unit in (
        (s["teacher_top1"], s["nearest_top1"], s["student_top1"], "% top-1"),
        (s.get("teacher_miou"), s.get("nearest_miou"), s.get("student_miou"), "% mean IoU"),
        (100.0, s["nearest_agreement"], s["teacher_agreement"], "% agreement with the teacher"),
    ):
        if teacher is not None and nearest is not None and student is not None:
            won, lost = student - nearest, teacher - nearest
            told = f"At {run.bits}, {run.method} reaches {student:.2f} {unit}; the teacher has {teacher:.2f}"
            if abs(won) < 0.005:
                return f"{told}, and rounding to nearest the same as calibration."
            if lost > 0.05 and won > 0:
                return f"{told}, and {_share(min(won / lost, 1))} of what rounding to nearest loses is won back."
            return f"{told} and rounding to nearest {nearest:.2f}."
    if s.get("student_sqnr_db") is not None and s.get("nearest_sqnr_db") is not None:
        return (
            f"At {run.bits}, the output of {run.method} is {s['student_sqnr_db']:.1f} dB above its noise; rounded to "
            f"nearest it is {s['nearest_sqnr_db']:.1f} dB."
        )
    return f"{run.method.capitalize()} at {run.bits} was not compared with anything: there was no validation."


def suggestions(run: Run) -> Iterator[str]:
    """Advice, the most pressing first."""
    s, settings = run.summary, run.summary["settings"]
    learns = s["method"] != "nearest"
    if not s["complete"]:
        yield (
            f"The run is not finished, {run.done} are done, and what was not calibrated is rounded to nearest: go on "
            "with `--ckpt_path RUN/checkpoints/last.ckpt` before anything else."
        )
    if learns and s["units"] and s["complete"] and not s["accepted"]:
        yield (
            f"Calibration did worse than rounding to nearest, so that all of it was put back: give {_more_images(s)} "
            f"or halve the learning rates (`--model.rounding_lr {settings['rounding_lr'] / 2:.2g}`, "
            f"`--model.scale_lr {settings['scale_lr'] / 2:.2g}`)."
        )
        return
    agreement = s["teacher_agreement"]
    if agreement is not None and agreement >= _GOOD:
        yield f"{agreement:.2f} % of the classes are the teacher's: little is left to gain, {_fewer_bits(run)}."
        return
    yield from _cost(run)
    if not learns:
        yield "Nothing was learned here: `--model.method qdrop` learns the rounding, in minutes for a small network."
        return
    yield from _rolled_back(run)
    yield from _overfit(run)
    yield from _steps(run)
    # With eight bits a weight's nearest value is hardly better than the next.
    fine = {layer["unit"] for layer in run.layers if layer["weight_bits"] >= 8}
    coarse = [unit for unit in run.units if unit["name"] not in fine]
    flipped = max(coarse, key=lambda unit: unit["flipped_fraction"], default=None)
    if flipped is not None and flipped["flipped_fraction"] > _FLIPPED and not s.get("judging_samples"):
        yield (
            f"In {flipped['name']!r} {_share(flipped['flipped_fraction'])} of the weights are not at their nearest "
            "value, far from the network that was trained, and all images that judged it were learned from. Where the "
            "data has more images than are drawn, a tenth more judge (`--model.held_out 0.1`)."
        )
    yield from _contrastive(run)
    if s["method"] in ("adaround", "brecq") and min(s["weight_bits"], s["act_bits"]) < 4:
        yield (
            f"Below four bits {s['method']!r} reads activations as they are: `--model.method qdrop` mixes in the "
            "teacher's."
        )


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.02 else f"{100 * value:.2g} %"


def _more_images(s: dict[str, Any]) -> str:
    """Twice as many images as were used, as far as there are as many."""
    used, there = s["calibration_samples"], s.get("images_available") or math.inf
    if used + s.get("skipped_images", {}).get("calibration", 0) >= there:
        return f"more images than the {used} that there are"
    return f"more images (`--data.calibration_samples {min(2 * used, there)}`)"


def _fewer_bits(run: Run) -> str:
    s = run.summary
    if s.get("average_bits") is not None:
        return (
            f"so that fewer bits are worth trying (`--model.quant.average_bits {max(2.0, s['average_bits'] - 0.5):g}`)"
        )
    fewer = [f"`--model.quant.{key} {s[key] - 1}`" for key in ("weight_bits", "act_bits") if 2 < s[key] <= 8]
    if not fewer:
        return "and the file can be exported as it is"
    return f"so that fewer bits are worth trying ({', '.join(fewer)})"


def _cost(run: Run) -> Iterator[str]:
    """The unit that adds most noise, and the tensor of it that loses most."""
    found = costliest(run)
    if found is None:
        return
    unit, grown = found
    before = f"{unit['name']!r} costs most: there the noise grows by {_share(grown)} of the signal's power"
    layers = [layer for layer in run.layers if layer["unit"] == unit["name"]]
    tensors = [(decibels_of(layer["grid"]), "weight_bits", layer) for layer in layers]
    tensors += [(decibels_of(run.reads(layer)), "act_bits", layer) for layer in layers]
    tensors = [tensor for tensor in tensors if tensor[2][tensor[1]] < 8]
    if not tensors:
        yield f"{before}, with 8 bits already."
        return
    decibels, key, layer = min(tensors, key=lambda tensor: tensor[0])
    bits = {2: 3, 3: 4}.get(layer[key], 8)
    what = "the weights of" if key == "weight_bits" else "what is read by"
    clipped = ""
    read = run.reads(layer)
    if key == "act_bits" and read is not None and read["clipped_fraction"] > _CLIPPED:
        clipped = f" ({_share(read['clipped_fraction'])} of its values lie beyond the range)"
    # With those that the run had, which it replaces.
    overrides = dict(run.summary.get("quant", {}).get("overrides", {}))
    overrides[layer["name"]] = overrides.get(layer["name"], {}) | {key: bits}
    yield (
        f"{before}, most of all through {what} {layer['name']!r}, {decibels:.1f} dB at {layer[key]} bits{clipped}. Try "
        f"`--model.quant.overrides {shlex.quote(json.dumps(overrides))}`."
    )


def _rolled_back(run: Run) -> Iterator[str]:
    names = [unit["name"] for unit in run.units if not unit["accepted"]]
    if names:
        shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield (
            f"{shown} {'was' if len(names) == 1 else 'were'} put back, since calibration raised the error there: with "
            f"{_more_images(run.summary)} or more steps "
            f"(`--model.steps_per_unit {2 * run.summary['steps_per_unit']}`) it may not."
        )
    if any(unit["name"] == NETWORK and not unit["accepted"] for unit in run.summary["units"]):
        yield (
            "The last epoch was undone, since it made predictions worse: lower its rate "
            f"(`--model.network_lr {run.summary['settings']['network_lr'] / 2:.2g}`) or leave it out "
            "(`--model.network_steps 0`)."
        )


def _overfit(run: Run) -> Iterator[str]:
    """Whether the calibration images are better off than those of validation by more than chance explains."""
    s = run.summary
    here, elsewhere = s.get("calibration_agreement"), s["teacher_agreement"]
    judged = run.record.get("confusion", {}).get("student", {}).get("images")
    if here is None or elsewhere is None or judged is None:
        return
    gap, variance = here - elsewhere, 0.0
    for agreement, images in ((here, s["calibration_samples"]), (elsewhere, judged)):
        # With one more image of each kind: else 100 % of a few images would be certain.
        share = (agreement / 100 * images + 1) / (images + 2)
        variance += share * (1 - share) / (images + 2)
    error = 100 * math.sqrt(variance)
    if gap > max(_GAP, 2 * error):
        yield (
            f"It agrees with the teacher {gap:.1f} points more often on the images it was calibrated with than on "
            f"others (standard error {error:.1f}), so some of what it learned holds for these alone: "
            f"{_more_images(s)} may help more than steps."
        )


def _steps(run: Run) -> Iterator[str]:
    """Whether the unit that costs most was still learning when its steps ended."""
    found = costliest(run)
    curve: dict[str, Any] = run.record.get("curves", {}).get(found[0]["name"], {}) if found else {}
    values = [value for value in curve.get("reconstruction", []) if value is not None]
    quarter = len(values) // 4
    if quarter < 2 or found is None:
        return
    before, last = (sum(part) / quarter for part in (values[-2 * quarter : -quarter], values[-quarter:]))
    if last < (1 - _STILL_FALLING) * before:
        yield (
            f"The error of {found[0]['name']!r} still fell by {_share(1 - last / before)} from the third quarter of "
            f"its steps to the last: `--model.steps_per_unit {2 * run.summary['steps_per_unit']}` goes on."
        )


def _contrastive(run: Run) -> Iterator[str]:
    """What docs/accuracy.md says: of W2A2, W2A4, W3A3 and W4A4 the first alone gained."""
    s = run.summary
    if s.get("average_bits") is not None:
        return
    two = max(s["weight_bits"], s["act_bits"]) == 2
    if two and not s["contrastive"] and s.get("part") is None:
        yield "At W2A2 the contrastive term has paid on ResNet-20, most with few images: `--model.contrastive true`."
    if s["contrastive"] and not two:
        yield "Beyond W2A2 the contrastive term gained nothing on ResNet-20, at a cost: `--model.contrastive false`."
