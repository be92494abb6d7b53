"""The page as HTML: facts, advice, figures and tables put into one file that loads nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

DASH = "\u2013"  # where there is no number


@dataclass(frozen=True)
class Table:
    """Rows of texts below `columns`; `numbers` are the columns set flush right, `fold` the line that unfolds it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    fold: str = ""

    @property
    def numbers(self) -> list[int]:
        """Columns whose cells are all numbers, or none."""
        return [
            i
            for i in range(1, len(self.columns))
            if self.rows and all(row[i][:1].isdigit() or row[i][:1] in f"-{DASH}" for row in self.rows)
        ]


@dataclass(frozen=True)
class Picture:
    """A PNG: its file's name without suffix, its bytes, and what it shows in words."""

    name: str
    png: bytes
    alt: str

    @property
    def data(self) -> str:
        """The bytes in base 64."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Section:
    """A heading, a line on how to read what follows, pictures, tables."""

    title: str
    lead: str = ""
    figures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """What is on a page; `facts` are (name, value), `advice` (heading, paragraph)."""

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    advice: Sequence[tuple[str, str]]
    sections: Sequence[Section] = field(default_factory=list)

    @property
    def pictures(self) -> list[Picture]:
        """Those of all sections, in order."""
        return [figure for section in self.sections for figure in section.figures]

    def html(self) -> str:
        """The page; every text is escaped."""
        environment = Environment(autoescape=True, undefined=StrictUndefined)
        template = environment.from_string(files(__package__).joinpath("page.html").read_text())
        shown = [section for section in self.sections if section.figures or any(table.rows for table in section.tables)]
        return template.render(
            title=self.title,
            subtitle=self.subtitle,
            facts=[{"name": name, "value": value} for name, value in self.facts],
            advice=self.advice,
            sections=shown,
        )


def number(value: float | int | None, digits: int = 3) -> str:
    """A number as a person reads it: so many significant digits, thousands apart, a dash where there is none."""
    if value is None:
        return DASH
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """A percentage with two decimals, as the table of a fit has it."""
    return DASH if value is None else f"{value:.2f} %"


def bytes_text(count: float) -> str:
    """A size in KiB or MiB."""
    return f"{number(count / 2**20)} MiB" if count >= 2**20 else f"{number(count / 2**10)} KiB"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and texts."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            plain = f"{value:.4g}" if isinstance(value, float) else value
            found[prefix + key] = plain if isinstance(plain, str) else json.dumps(plain)
    return found
