"""Every notebook runs as committed: no outputs in the file, no error, no warning, and a plot wherever it shows one."""

from __future__ import annotations

import os
from pathlib import Path

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


@notebook
def test_it_runs_and_plots(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel starts in a folder of its own, where a checkout that is not installed would not be found.
    package = str(Path(lightning_ptq.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's python3 kernel, not the user's
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no startup files, no history

    content = nbformat.read(path, as_version=4)
    folder = tmp_path / "run"
    folder.mkdir()
    client = NotebookClient(content, kernel_name="python3", timeout=170, resources={"metadata": {"path": str(folder)}})
    client.shutdown_kernel = "immediate"  # a kernel that tidies up behind the last cell takes seconds
    client.execute()

    shows = [cell for cell in content.cells if cell.cell_type == "code" and "plt.show()" in cell.source]
    assert shows, "the notebook has no plot"
    for cell in shows:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.id
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if "Warning" in output.get("text", "")]
    assert not list(folder.iterdir()), "the notebook leaves files where it runs"
