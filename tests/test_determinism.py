"""The same seed on the same machine gives the same summary, which records what it depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchvision

from lightning_ptq import ContrastiveConfig
from lightning_ptq.fingerprint import VERSION
from tests.helpers import assert_equal_states, quantization_state, tiny_data, tiny_module, trainer

MEASURED = ("wall_seconds", "peak_rss_bytes", "peak_device_bytes")


def fit(folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The summary without what it measures of time and memory, and the student's state."""
    module = tiny_module(**changes)
    trainer(folder).fit(module, datamodule=tiny_data(100, more=20))
    summary = json.loads((folder / "summary.json").read_text())
    for key in MEASURED:
        del summary[key]
    for unit in summary["units"]:
        del unit["seconds"]
    return summary, quantization_state(module)


@pytest.mark.parametrize(
    "changes",
    [{}, {"contrastive": True, "critic": ContrastiveConfig(feature="tail")}, {"method": "brecq"}, {"held_out": 0.2}],
    ids=["qdrop", "contrastive", "brecq", "held out"],
)
def test_two_fits_are_bit_equal(tmp_path: Path, changes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    first, state = fit(tmp_path / "first", **changes)
    torch.manual_seed(2)  # of no consequence: every draw has a seed of its own
    second, again = fit(tmp_path / "second", **changes)
    assert first == second
    assert_equal_states(state, again)
    assert first != fit(tmp_path / "third", seed=4, **changes)[0]


def test_the_summary_records_what_the_result_depends_on(tmp_path: Path) -> None:
    summary, _ = fit(tmp_path, held_out=0.2, rounding_weight=0.02)
    assert summary["seed"] == 3
    assert summary["settings"]["processes"] == 1
    assert summary["settings"]["precision"] == "32-true"
    assert (summary["settings"]["held_out"], summary["settings"]["rounding_weight"]) == (0.2, 0.02)
    assert summary["quant"]["weight_bits"] == 2
    assert summary["trainer"]["accumulate_grad_batches"] == 1
    assert all(summary["digests"].values())
    environment = summary["environment"]
    assert environment["threads"] == torch.get_num_threads()
    assert environment["lightning"] == L.__version__
    assert environment["lightning_ptq"] == VERSION
    assert environment["torch"] == torch.__version__
    assert torchvision.__version__.startswith(environment["torchvision"])
    assert environment["device"].startswith("cpu")
