"""A run's page: it holds the run's numbers, loads nothing, and can be drawn again from the folder alone."""

from __future__ import annotations

import base64
import io
import json
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from lightning_ptq import CalibrationDataModule, PTQError, PTQModule, QuantConfig, summary
from lightning_ptq.report import write_report
from tests.helpers import tiny_data, tiny_images, tiny_module, trainer
from tests.test_interruptions import At, terminate


class Loggers(DummyLogger):
    """Takes figures as TensorBoard's does."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[str] = []

    @property
    def experiment(self) -> Any:
        return self

    def add_figure(self, name: str, figure: Any, step: int) -> None:
        self.figures.append(name)
        raise RuntimeError("a logger that is out of order harms nothing")


class Parsed(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def logger() -> Loggers:
    return Loggers()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, logger: Loggers) -> Path:
    """Folder of a finished run with a report."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, logger=[logger]).fit(tiny_module(contrastive=True, report=True), datamodule=tiny_data())
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def change(folder: Path, name: str, **changes: Any) -> None:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_page_holds_the_runs_numbers(run: Path) -> None:
    told = json.loads((run / "summary.json").read_text())
    text = Parsed((run / "report.html").read_text()).text
    assert f"{told['student_top1']:.2f} %" in text
    assert f"{told['teacher_agreement']:.2f} %" in text
    for unit in told["units"]:
        assert unit["name"] in text
        assert f"{unit['mse_after']:.3g}" in text
    assert told["digests"]["model"] in text
    assert told["environment"]["torch"] in text
    for layer in json.loads((run / "record.json").read_text())["layers"]:
        assert layer["name"] in text


def test_the_page_loads_nothing_and_holds_the_figures(run: Path) -> None:
    page = Parsed((run / "report.html").read_text())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [
        value or "" for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset")
    ]
    assert len(sources) == 7
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in "".join(page.text)
    embedded = [base64.b64decode(source.partition(",")[2]) for source in sources]
    assert sorted(embedded) == sorted(path.read_bytes() for path in (run / "report").glob("*.png"))
    for png in embedded:
        image = Image.open(io.BytesIO(png)).convert("L")
        assert image.width > 1000
        assert image.getextrema()[0] < 100, "an empty figure"


def test_loggers_get_the_figures(run: Path, logger: Loggers) -> None:
    assert sorted(logger.figures) == sorted(f"report/{path.stem}" for path in (run / "report").glob("*.png"))


def test_it_is_drawn_again_from_the_folder_alone(copy: Path, run: Path) -> None:
    (copy / "report.html").unlink()
    shutil.rmtree(copy / "checkpoints")
    change(copy, "summary", student_top1=12.34, model="<b>Net</b>")
    assert write_report([copy], layers=["stem", "f?"]) == copy / "report.html"
    page = Parsed((copy / "report.html").read_text())
    assert "12.34 %" in page.text
    html = (copy / "report.html").read_text()
    assert "&lt;b&gt;Net" in html
    assert "<b>Net" not in html
    # Two more layers than the worst three, for a second row.
    assert size(copy / "report" / "weights.png")[1] > size(run / "report" / "weights.png")[1]


def test_several_runs_stand_side_by_side(copy: Path, run: Path, tmp_path: Path) -> None:
    settings = json.loads((copy / "summary.json").read_text())["settings"]
    environment = json.loads((copy / "summary.json").read_text())["environment"]
    change(copy, "summary", student_top1=12.34, settings=settings | {"steps_per_unit": 77, "precision": "bf16-mixed"},
           digests={"model": "abc", "images": 5}, environment=environment | {"torch": "9.9", "lightning_ptq": "8.8"},
    )  # fmt: skip
    output, others = tmp_path / "both.html", tmp_path / "both" / "mine.png"
    others.parent.mkdir()
    others.touch()
    (tmp_path / "both_files").mkdir()
    (tmp_path / "both_files" / "gone.png").touch()
    assert write_report([run, copy], output) == output
    text = Parsed(output.read_text()).text
    assert {"12.34 %", "2 runs side by side", "steps_per_unit", "77", copy.name, run.name} <= set(text)
    assert {"digest of weights", "abc", "digest of images", "5", "torch", "9.9", "lightning_ptq", "8.8"} <= set(text)
    assert {"precision", "bf16-mixed"} <= set(text)
    assert not {"batch_size", "python"} & set(text), "only what differs"
    assert others.exists(), "another folder's pictures stay"
    assert not (tmp_path / "both_files" / "gone.png").exists(), "a drawing that there is no more goes"
    with pytest.raises(PTQError, match=r"both.html' exists. Choose another name with --output, or give --overwrite"):
        write_report([run], output)
    write_report([run], output, overwrite=True)


def test_several_runs_are_drawn_here_and_nothing_is_overwritten(
    copy: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.png").touch()
    assert write_report([run, copy]).resolve() == tmp_path / "report.html"
    assert (tmp_path / "report_files" / "results.png").exists()
    assert (tmp_path / "report" / "mine.png").exists()
    with pytest.raises(PTQError, match=r"'report.html' exists. Choose another name with --output"):
        write_report([run, copy])
    monkeypatch.chdir(copy)
    with pytest.raises(PTQError, match=r"'report.html' exists"):
        write_report([".", run])


def test_what_can_not_be_drawn_is_one_sentence(run: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(PTQError, match=r"holds no run: there is no summary.json in it. Give the folder"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(PTQError, match=r"holds no run.*Below it are: .*copy"):
        write_report([tmp_path])
    with pytest.raises(PTQError, match=r"names no page. Let it end in .html"):
        write_report([run], tmp_path / "report.pdf")
    with pytest.raises(PTQError, match=r"layers='conv9' matches no quantized layer of .*It has: stem, blocks"):
        write_report([run], tmp_path / "a.html", layers=["conv9"])
    change(copy, "record", format=99)
    with pytest.raises(PTQError, match="has format 99, and this version reads 1"):
        write_report([copy])
    (copy / "record.json").write_text("{")
    with pytest.raises(PTQError, match=r"record.json' can't be read"):
        write_report([copy])
    (copy / "summary.json").write_text('{"accuracy": 3}')
    with pytest.raises(PTQError, match="is not of lightning_ptq: it has no 'model'"):
        write_report([copy])
    assert not (tmp_path / "a.html").exists()


def test_an_older_run_without_a_record_gets_what_there_is(copy: Path) -> None:
    (copy / "record.json").unlink()
    write_report([copy], copy / "old.html")
    assert {path.stem for path in (copy / "old_files").iterdir()} == {"result", "units"}


def test_a_report_that_fails_is_a_warning_and_the_run_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr(summary, "write_report", fail)
    with pytest.warns(UserWarning, match=r"could not be drawn: no ink. .*try again: lightning-ptq report .*run"):
        trainer(tmp_path / "run").fit(tiny_module(report=True, steps_per_unit=1), datamodule=tiny_data())
    monkeypatch.undo()
    assert write_report([tmp_path / "run"]).exists()


def test_an_interrupted_run_gets_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        trainer(tmp_path, callbacks=[At(9, terminate)]).fit(tiny_module(report=True), datamodule=tiny_data())
    assert not json.loads((tmp_path / "summary.json").read_text())["complete"]
    text = "".join(Parsed((tmp_path / "report.html").read_text()).text)
    assert "not finished, 1 of 5 epochs are done" in text


def test_a_dense_network_gets_a_report_without_classes(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)).eval()
    batches = DataLoader(tiny_images(16), batch_size=16)
    data = CalibrationDataModule.from_loaders(batches, batches, calibration_samples=16)
    module = PTQModule(net, QuantConfig(4, 4), steps_per_unit=2, batch_size=8, seed=0, report=True, network_steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few images
        trainer(tmp_path).fit(module, datamodule=data)
    assert {path.stem for path in (tmp_path / "report").iterdir()} == {
        "result", "units", "losses", "layers", "activations", "weights",
    }  # fmt: skip
    assert "output SQNR" in Parsed((tmp_path / "report.html").read_text()).text
