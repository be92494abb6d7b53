"""The benchmarks follow the package: their settings are its settings, and their tables can be made."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from benchmarks.methods import DEFAULTS, GRIDS, RESULTS, key, points
from benchmarks.results import document
from lightning_ptq import ContrastiveConfig, PTQModule


@pytest.mark.parametrize(
    "name", ["allocator", "census", "common", "critic", "methods", "ranges", "results", "rounding_gain", "soak", "vit"]
)
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
    assert "| w2a2 | 250 | 32 | False | 1.00 ± 0.00 | 81.00 ± 1.41 |" in text
    # Of the same seeds: +0.5 and +1.5.
    assert "81.00 ± 1.41 | 82.00 ± 2.12 | +1.00 ± 0.50" in text
    # Of both bases: +0.5, +1.5 and +1.5, +4.5, so +1 and +3 over the seeds.
    assert "| resnet20 | w2a2 | 1024 | 500 | 63 | brecq, qdrop | +2.00 ± 1.00 | 2 |" in text
    assert "Commits: abc." in text
