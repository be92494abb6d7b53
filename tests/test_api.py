"""The public names and their signatures are those of `public_api.txt`; a change of them is one that users notice.

`python -m tests.test_api` prints the list as it is now.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L

import lightning_ptq
from lightning_ptq import compare, convert

LIST = Path(__file__).parent / "public_api.txt"
CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"
# What is documented below names of its own.
ELSEWHERE = {
    "compare.compare": compare.compare,
    "compare.open_artifact": compare.open_artifact,
    "convert.convert": convert.convert,
}
# What parts of the package tell one another, free to change.
INTERNAL = {
    *("checked", "enter_unit", "input_shape", "judge_last_unit", "leave_units", "settings", "steps_of", "unit_loader"),
    *("batches_of", "begin_recording", "forget_recordings", "set_steps_per_batch", "steps_taken"),
    *(
        "unread_images",
        "draw_seed",
        "calibration_count",
        "check",
        "check_overrides",
        "corrects_biases",
        "fixes",
        "learns_network",
    ),
    *("rate_factors", "rounding_progress", "caches", "folder_of_caches"),
}
HOOKS = {name for kind in (L.LightningModule, L.LightningDataModule) for name in dir(kind)} - {"load_from_checkpoint"}


def signature(thing: Callable[..., Any]) -> str:
    """With defaults; without the quotes around annotations."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(thing)))


def public_api() -> Iterator[str]:
    """One line for each name: functions, classes, and what classes add to those of Lightning and torch."""
    names = {name: getattr(lightning_ptq, name) for name in lightning_ptq.__all__} | ELSEWHERE
    for name, thing in names.items():
        if inspect.isclass(thing) and issubclass(thing, Exception):
            yield f"{name}({thing.__mro__[1].__name__})"
            continue
        yield f"{name}{signature(thing)}"
        for member in sorted(vars(thing)) if inspect.isclass(thing) else ():
            value = inspect.getattr_static(thing, member)
            if member.startswith("_") or member in HOOKS | INTERNAL:
                continue
            if isinstance(value, (property, cached_property)):
                yield f"{name}.{member}"
            elif inspect.isroutine(value):
                yield f"{name}.{member}{signature(getattr(thing, member))}"


# Before a fixture changes a default that tests can do without.
NOW = set(public_api())


def test_the_public_names_and_signatures_are_those_that_were_agreed_on() -> None:
    before, now = set(LIST.read_text().splitlines()), NOW
    assert now == before, (
        f"gone: {sorted(before - now)}; new: {sorted(now - before)}. If that is meant: `python -m tests.test_api > "
        "tests/public_api.txt`, and a line in CHANGELOG.md that says what users have to change."
    )


def test_what_is_exported_has_a_docstring() -> None:
    for name in lightning_ptq.__all__:
        assert getattr(lightning_ptq, name).__doc__, name
    assert lightning_ptq.__all__ == sorted(lightning_ptq.__all__)


def test_the_changelog_is_of_this_version() -> None:
    """The version is in pyproject.toml alone; the changelog has what is in it, newest first."""
    newest = re.findall(r"^## (?!Unreleased)(\S+)", CHANGELOG.read_text(), re.MULTILINE)[0]
    assert lightning_ptq.__version__ == newest
    assert re.fullmatch(r"\d+\.\d+\.\d+", lightning_ptq.__version__)


if __name__ == "__main__":
    sys.stdout.write("".join(f"{line}\n" for line in public_api()))
