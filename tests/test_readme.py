"""What README.md and the page on deployment show runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_ptq as ptq
from lightning_ptq.export import lowering, pt2
from tests.helpers import tiny_images, tiny_net
from tests.test_convert import calibrated

README = Path(__file__).parent.parent / "README.md"
DEPLOY = README.parent / "docs" / "how-to" / "deploy.md"
EXAMPLES, DEPLOYED = (re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in (README, DEPLOY))


# What a user without a progress bar, logger or max_epochs would see is Lightning's business.
@pytest.mark.filterwarnings("ignore:.*tensorboard.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, use = EXAMPLES
    assert DEPLOYED[0] == use
    assert example.count("\n") <= 13
    monkeypatch.chdir(tmp_path)
    images = tiny_images(40)
    names = {
        "model": tiny_net(),
        "calib_loader": DataLoader(images, batch_size=20),
        "val_loader": DataLoader(TensorDataset(images, tiny_net()(images).argmax(1)), batch_size=20),
    }
    exec(example.replace("steps_per_unit=2000", "steps_per_unit=3"), names)
    assert len(names["module"].reports) == 5
    fitted, names["images"] = names["module"], images
    (last,) = tmp_path.rglob("last.ckpt")
    exec(use.replace("RUN/checkpoints/last.ckpt", str(last)), names)
    with torch.no_grad():
        assert torch.equal(names["module"](images), fitted(images))


@pytest.mark.skipif(lowering.why_not(True) is not None, reason=str(lowering.why_not(True)))
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # as in tests/export/test_lowering.py
def test_the_example_with_int8_kernels_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = tiny_images(32)
    student = calibrated(tiny_net(), ptq.QuantConfig(8, 8, placement="hardware", weight_symmetric=True), images)
    pt2.save_pt2(student, (3, 8, 8), Path("model.pt2"))
    names = {"ptq": ptq, "images": images}
    exec(DEPLOYED[1], names)
    with torch.no_grad():
        torch.testing.assert_close(names["logits"], student(images), rtol=1e-4, atol=1e-4)


def test_the_two_commands_are_those_of_ci() -> None:
    ci = (README.parent / ".ci" / "run").read_text()
    text = README.read_text()
    for command in ('pip install -e ".[demo,dev]"', "pytest -n 2"):
        assert f"    {command}\n" in text
    assert '-e ".[demo,dev,docs]"' in ci
    assert 'phase "tests" pytest -n 2 ' in ci
