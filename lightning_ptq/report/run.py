"""A run folder as a report reads it: `summary.json`, and `record.json` where there is one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning_ptq.errors import PTQError
from lightning_ptq.network import NETWORK
from lightning_ptq.record import FORMAT

# Without these it is another program's summary.
_KEYS = ("model", "method", "weight_bits", "act_bits", "units", "settings", "wall_seconds")


@dataclass(frozen=True)
class Run:
    """One run: what is in its summary and in its record, which an older run lacks."""

    folder: Path
    summary: dict[str, Any]
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """What the run is called beside others."""
        return self.folder.resolve().name

    @property
    def units(self) -> list[dict[str, Any]]:
        """Reports of the units, without the one of the whole network."""
        return [unit for unit in self.summary["units"] if unit["name"] != NETWORK]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The quantized layers that have ranges."""
        return [layer for layer in self.record.get("layers", []) if layer["grid"] is not None]

    @property
    def activations(self) -> dict[str, dict[str, Any]]:
        """What activation quantizers were shown, by their names."""
        found: dict[str, dict[str, Any]] = self.record.get("activations", {})
        return found

    def reads(self, layer: dict[str, Any]) -> dict[str, Any] | None:
        """The activation that a layer reads."""
        return self.activations.get(layer["reads"])

    @property
    def bits(self) -> str:
        """As in W4A4."""
        average = self.summary.get("average_bits")
        whole = f"W{self.summary['weight_bits']}A{self.summary['act_bits']}"
        return whole if average is None else f"{average:g} bits on average"

    @property
    def method(self) -> str:
        """The method and what was added to it."""
        added = [key.replace("_", " ") for key in ("contrastive", "corrected_biases") if self.summary.get(key)]
        return " + ".join([self.summary["method"], *added])

    @property
    def done(self) -> str:
        """How many of the run's epochs are done, in words."""
        planned = len(self.record.get("epochs", []))
        return f"{len(self.summary['units'])} of {planned or 'an unknown number of'} epochs"


def read_run(folder: str | Path) -> Run:
    """The run that a fit left in `folder`.

    Raises:
        PTQError: there is none, it is damaged, or another program's.
    """
    folder = Path(folder)
    if not (folder / "summary.json").is_file():
        below = sorted(str(path.parent) for path in folder.glob("**/summary.json")) if folder.is_dir() else []
        hint = f" Below it are: {', '.join(below[:5])}." if below else ""
        raise PTQError(
            f"{str(folder)!r} holds no run: there is no summary.json in it.{hint} Give the folder that fit names when "
            "it ends."
        )
    summary = _read(folder / "summary.json")
    missing = [key for key in _KEYS if key not in summary]
    if missing:
        raise PTQError(
            f"{str(folder / 'summary.json')!r} is not of lightning_ptq: it has no {missing[0]!r}. Give the folder that "
            "fit names when it ends."
        )
    record = _read(folder / "record.json") if (folder / "record.json").is_file() else {}
    if record.get("format", FORMAT) != FORMAT:
        raise PTQError(
            f"{str(folder / 'record.json')!r} has format {record['format']}, and this version reads {FORMAT}. Use the "
            "version of lightning_ptq that the run was made with."
        )
    return Run(folder, summary, record)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise PTQError(f"{str(path)!r} can't be read: {error}. Give the folder of a run that is whole.") from None
    if not isinstance(content, dict):
        raise PTQError(f"{str(path)!r} is not of lightning_ptq. Give the folder that fit names when it ends.")
    return content


def noise(unit: dict[str, Any]) -> float:
    """Noise to signal of a unit's output; 0 where its ratio is unknown."""
    decibels = unit["sqnr_db"]
    return 0.0 if decibels is None else 10.0 ** (-decibels / 10)


def costliest(run: Run) -> tuple[dict[str, Any], float] | None:
    """The unit behind which the noise-to-signal ratio has grown most, and by how much; None before any is done.

    A unit's ratio is what it and all before it make, so the difference is its own share.
    """
    ratios = [noise(unit) for unit in run.units]
    grown = [now - before for now, before in zip(ratios, [0.0, *ratios], strict=False)]
    if not grown or max(grown) <= 0:
        return None
    index = grown.index(max(grown))
    return run.units[index], grown[index]


def decibels_of(entry: dict[str, Any] | None) -> float:
    """Signal-to-noise ratio of a weight's or an activation's entry; infinite where it is unknown."""
    value = math.inf if entry is None else entry["sqnr_db"]
    return math.inf if value is None else value


def worst_layers(run: Run, key: str, count: int) -> list[dict[str, Any]]:
    """The `count` layers whose "weights", or what they read ("activations"), lose most to quantization."""

    def lost(layer: dict[str, Any]) -> float:
        return decibels_of(layer["grid"] if key == "weights" else run.reads(layer))

    return sorted(run.layers, key=lost)[:count]


def chosen_layers(run: Run, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """The layers whose names match one of `patterns`.

    Raises:
        PTQError: a pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(layer["name"], pattern) for layer in run.layers):
            raise PTQError(
                f"layers={pattern!r} matches no quantized layer of {str(run.folder)!r}. It has: "
                f"{', '.join(layer['name'] for layer in run.layers) or 'none that are calibrated'}."
            )
    return [layer for layer in run.layers if any(fnmatchcase(layer["name"], pattern) for pattern in patterns)]
