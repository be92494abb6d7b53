"""The benchmarks follow the package: their settings are its settings, and their tables can be made."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common
from benchmarks.methods import DEFAULTS, GRIDS, RESULTS, key, points
from benchmarks.results import document
from lightning_ptq import ContrastiveConfig, PTQModule


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(common.__file__).parent.glob("*.py")))
def test_each_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__


@pytest.mark.parametrize("name", GRIDS)
def test_the_points_of_a_grid_are_runs_of_their_own(name: str) -> None:
    grid = points(GRIDS[name])
    assert len({key(settings) for settings in grid}) == len(grid)
    arguments = inspect.signature(PTQModule).parameters
    for settings in grid:
        assert settings.keys() == DEFAULTS.keys()
        assert settings["options"].keys() <= {*arguments.keys(), "quant"}
        ContrastiveConfig(**settings["critic"])


def test_rows_become_tables(tmp_path: Path) -> None:
    rows = {}
    for seed, top1 in ((0, 80.0), (1, 82.0)):
        for contrastive, more in ((False, 0.0), (True, 0.5 + seed)):
            run = DEFAULTS | {"seed": seed, "contrastive": contrastive, "steps": 250 * (1 + contrastive)}
            for settings in (run, run | {"steps": 500}, run | {"steps": 500, "method": "brecq"}):
                if settings["method"] == "brecq":
                    more *= 3
                values = dict.fromkeys(RESULTS, "1.0") | {"student_top1": str(top1 + more), "commit": "abc"}
                rows[key(settings)] = dict(zip(DEFAULTS, key(settings), strict=True)) | values
    text = document(rows, {}, tmp_path)
    assert "| w2a2 | 250 | 158 | False | 1.00 ± 0.00 | 81.00 ± 1.41 |" in text
    # Of the same seeds: +0.5 and +1.5.
    assert "81.00 ± 1.41 | 82.00 ± 2.12 | +1.00 ± 0.50" in text
    # Of both bases: +0.5, +1.5 and +1.5, +4.5, so +1 and +3 over the seeds.
    assert "| resnet20 | w2a2 | 1024 | 500 | 224 | brecq, qdrop | +2.00 ± 1.00 | 2 |" in text
    assert "Commits: abc." in text


def test_rows_that_a_file_lacks_are_added_and_others_left(tmp_path: Path) -> None:
    out, asked = tmp_path / "rows.csv", []

    def rows_of(name: str) -> list[dict[str, Any]]:
        asked.append(name)
        return [{"model": name, "value": 1, "other": "not a column"}, {"model": name, "value": 2}]

    first = common.complete(out, ("model", "value"), ["a"], rows_of)
    second = common.complete(out, ("model", "value"), ["a", "b"], rows_of)
    assert asked == ["a", "b"]
    assert first == second[:2] == [{"model": "a", "value": "1"}, {"model": "a", "value": "2"}]
    assert out.read_text() == "model,value\na,1\na,2\nb,1\nb,2\n"


def test_a_process_of_its_own_says_what_it_died_of() -> None:
    with pytest.raises(RuntimeError, match="unrecognized arguments: --nonsense"):
        common.in_process("eight_bits", "--nonsense")
    with pytest.raises(RuntimeError, match="took longer than 0 s"):
        common.in_process("eight_bits", "--help", limit=0.01)
