"""Every notebook runs as committed: no outputs in the file, no error, no warning, and a plot wherever it shows one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import lightning_ptq

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS, "no notebook found"  # an empty list of parameters would only skip

notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@notebook
def test_no_outputs_are_committed(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs, cell.id
            assert cell.execution_count is None, cell.id


async def executed(path: Path, folder: Path) -> tuple[Any, Path]:
    """The notebook with its outputs, and the folder it ran in."""
    content, own = nbformat.read(path, as_version=4), folder / "run"
    own.mkdir()
    # The kernel starts in a folder of its own, where a checkout that is not installed would not be found.
    package = str(Path(lightning_ptq.__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "IPYTHONDIR": str(folder / "ipython"),  # no startup files, no history
    }
    client = NotebookClient(content, kernel_name="python3", timeout=170, resources={"metadata": {"path": str(own)}})
    client.shutdown_kernel = "immediate"  # a kernel that tidies up behind the last cell takes seconds
    await client.async_execute(env=environment)
    return content, own


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Any]:
    """What came of the notebooks that are asked for, two at a time: each has a kernel of its own, and one thread."""

    async def several(paths: list[Path]) -> list[Any]:
        free = asyncio.Semaphore(2)

        async def one(path: Path) -> tuple[Any, Path]:
            async with free:
                return await executed(path, tmp_path_factory.mktemp(path.stem))

        return await asyncio.gather(*map(one, paths), return_exceptions=True)

    asked = [item for item in request.session.items if item.name.startswith("test_it_runs_and_plots[")]
    paths = [item.callspec.params["path"] for item in asked if isinstance(item, pytest.Function)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's python3 kernel, not the user's
        return dict(zip(paths, asyncio.run(several(paths)), strict=True))


@notebook
def test_it_runs_and_plots(path: Path, runs: dict[Path, Any]) -> None:
    if isinstance(runs[path], BaseException):
        raise runs[path]
    content, folder = runs[path]
    shows = [cell for cell in content.cells if cell.cell_type == "code" and "plt.show()" in cell.source]
    assert shows, "the notebook has no plot"
    for cell in shows:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.id
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if "Warning" in output.get("text", "")]
    assert not list(folder.iterdir()), "the notebook leaves files where it runs"
