"""The report of a run: one HTML file that loads nothing, and its figures as PNGs in a folder beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_ptq.errors import PTQError
from lightning_ptq.files import write_whole
from lightning_ptq.report.run import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]


def write_report(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    layers: Sequence[str] = (),
    overwrite: bool = False,
    show: Callable[[str, Figure, Path], object] | None = None,
) -> Path:
    """Draw the report of one run, or of several side by side, from what lies in their folders.

    Args:
        runs: folders that fits have left.
        output: the HTML file to write; None rewrites `report.html` in the folder of the run, and writes one here for
            several. PNGs go into a folder beside it: `report` in a run's, else `NAME_files` for NAME.html. It is the
            report's own: other PNGs go.
        layers: patterns of names of layers whose histograms are drawn in the report of one run, beside the worst.
        overwrite: replace an `output` that is there.
        show: is given each figure's name, the figure and its file.

    Returns:
        Path of the HTML file.

    Raises:
        PTQError: a folder without a run, a pattern that matches no layer, an output that exists or is no .html.
    """
    if not runs:
        raise PTQError("report needs a run: give the folder that fit names when it ends.")
    if layers and len(runs) > 1:
        raise PTQError("layers are chosen in the report of one run. Leave them out, or give one run.")
    if output is None and len(runs) > 1:
        output = "report.html"
    path = Path(runs[0]) / "report.html" if output is None else Path(output)
    if path.suffix not in (".html", ".htm"):
        raise PTQError(f"output={str(path)!r} names no page. Let it end in .html.")
    if output is not None and path.exists() and not overwrite:
        raise PTQError(f"{str(path)!r} exists. Choose another name with --output, or give --overwrite true.")
    found = [read_run(folder) for folder in runs]

    # Only now: drawing takes longer to import than all of the above, and most of the package does without.
    from lightning_ptq.report.content import comparison_of, page_of

    page, figures = page_of(found[0], layers) if len(found) == 1 else comparison_of(found)
    folder = path.with_name("report" if output is None else f"{path.stem}_files")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in {*folder.glob("*.png")} - {folder / f"{picture.name}.png" for picture in page.pictures}:
        stale.unlink()
    for picture in page.pictures:
        file, content = folder / f"{picture.name}.png", picture.png
        write_whole(file, lambda to, content=content: to.write_bytes(content))  # type: ignore[misc]
        if show is not None:
            show(picture.name, figures[picture.name], file)
    html = page.html()
    write_whole(path, lambda to: to.write_text(html, encoding="utf-8"))
    return path
