"""How the report's drawings look, and what they share.

One colour has one meaning in all of them: grey is full precision, orange rounded to nearest, blue calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

_Drawing = TypeVar("_Drawing", bound=Callable[..., Figure | None])

# Colours that colour-blind readers can tell apart (Okabe and Ito).
GREY, ORANGE, BLUE, RED = "#8a8f98", "#E69F00", "#0072B2", "#D55E00"
GREEN = "#009E73"
TERMS = (BLUE, GREEN, "#CC79A7", ORANGE, "#56B4E9", RED)
WIDTH = 9.4  # inches, the page's at 100 pixels an inch
DPI = 160
ROW = 0.27  # of a bar
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b6bac2",
    "axes.labelcolor": "#4a4f58",
    "text.color": "#22262e",
    "xtick.color": "#4a4f58",
    "ytick.color": "#4a4f58",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8ec",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def styled(function: _Drawing) -> _Drawing:
    """The function, drawing in this style."""
    return rc_context(STYLE)(function)


def values_of(entries: Iterable[float | None]) -> list[float]:
    """Numbers to draw: NaN, which leaves a gap, in place of None."""
    return [math.nan if entry is None else entry for entry in entries]


def short(name: str, length: int = 28) -> str:
    """A name that fits beside an axis: its end says more than its middle."""
    return name if len(name) <= length else f"{name[: length // 3]}…{name[-(length - length // 3 - 1) :]}"


def plain_log(axis: Axis) -> None:
    """A logarithmic axis with plain numbers: powers set as such would need mathematical fonts."""
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """One row for each name, the first on top."""
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
