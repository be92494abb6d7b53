"""What comes from elsewhere, be it a checkpoint, a packed file or a config, runs no code and is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lightning_ptq as ptq
from lightning_ptq import PTQError, PTQModule
from lightning_ptq.cli import main
from lightning_ptq.export.packed import digest
from tests.helpers import TinyNet, tiny_data, tiny_module, tiny_net, trainer

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fit's folder, with a packed file."""
    folder, module = tmp_path_factory.mktemp("run"), tiny_module(steps_per_unit=2)
    trainer(folder, logger=False).fit(module, datamodule=tiny_data())
    ptq.save_packed(module, folder / "model.ptq")
    return folder


def crafted(run_folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """The fit's checkpoint with more in it."""
    checkpoint = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(checkpoint | changes, tmp_path / "crafted.ckpt")
    return tmp_path / "crafted.ckpt"


# ---- checkpoints ----


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "export", "compare"])
def test_a_crafted_checkpoint_runs_no_code(run_folder: Path, tmp_path: Path, command: str) -> None:
    path = crafted(run_folder, tmp_path, code=Bomb(tmp_path / "ran"))
    given = [str(path), "float"] if command == "compare" else [f"--ckpt_path={path}"]
    with pytest.raises(PTQError, match=r"can't be read"):
        main([command, *given, "--config", QUICKSTART, f"--trainer.default_root_dir={tmp_path}"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_a_crafted_checkpoint_runs_no_code_from_python_either(run_folder: Path, tmp_path: Path, command: str) -> None:
    path = crafted(run_folder, tmp_path, code=Bomb(tmp_path / "ran"))
    with pytest.raises(PTQError, match=r"can't be read"):
        PTQModule.load_from_checkpoint(path, model=tiny_net())
    module, run = tiny_module(steps_per_unit=2), getattr(trainer(tmp_path / "run"), command)
    with pytest.raises(UnpicklingError, match="Weights only load failed"):
        run(module, datamodule=tiny_data(), ckpt_path=path)
    assert not (tmp_path / "ran").exists()


def test_settings_in_a_checkpoint_are_not_imported_and_called(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's command line takes hyperparameters of a checkpoint for settings, the model's import path included."""
    (tmp_path / "planted.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for told in ({"model": "planted.build"}, {"_class_path": "planted.Module"}):
        path = crafted(run_folder, tmp_path, hyper_parameters=told)
        with pytest.raises(PTQError, match=r"checkpoint was made with another|belongs to another model"):
            main(["validate", "--config", QUICKSTART, f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path}"])
        assert not (tmp_path / "ran").exists()
        assert "planted" not in sys.modules


def test_a_checkpoint_from_a_url_is_read_as_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: Any, weights_only: bool | None = None, **kwargs: Any) -> Any:
        asked.append(weights_only)  # None is no for a URL
        raise ConnectionError("stop here")

    monkeypatch.setattr(TorchCheckpointIO, "load_checkpoint", load)
    with pytest.raises(ConnectionError, match="stop here"):
        main(["validate", "--config", QUICKSTART, "--ckpt_path=http://localhost/last.ckpt",
              f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    assert asked == [True]


@pytest.mark.parametrize("told", [{}, {"structure": 3, "settings": {}}, {"structure": {"granularity": "block"}}, None])
def test_a_checkpoint_without_its_settings_is_refused(run_folder: Path, tmp_path: Path, told: Any) -> None:
    path = crafted(run_folder, tmp_path, lightning_ptq=told)
    with pytest.raises(PTQError, match="settings are not those of lightning_ptq"):
        PTQModule.load_from_checkpoint(path, model=tiny_net())


# ---- packed files ----


@pytest.mark.parametrize(
    "changes",
    [{"quant": {"evil": 1}}, {"quant": None}, {"granularity": None}, {"bits": {"weights": {}}}, {"leaf_modules": 7}],
    ids=["unknown key", "no settings", "no granularity", "half the bits", "no list"],
)
def test_a_packed_file_with_other_settings_is_refused(run_folder: Path, tmp_path: Path, changes: Any) -> None:
    """Its SHA-256 protects from damage; whoever means harm writes a new one."""
    with safe_open(str(run_folder / "model.ptq"), framework="pt") as file:
        told = json.loads(file.metadata()["lightning_ptq"])
    tensors = load_file(str(run_folder / "model.ptq"))
    text = json.dumps(told | changes, sort_keys=True)
    save_file(tensors, str(tmp_path / "bad.ptq"), {"lightning_ptq": text, "sha256": digest(tensors, text)})
    with pytest.raises(PTQError):
        ptq.load_packed(tmp_path / "bad.ptq", TinyNet())


def test_a_packed_file_with_numbers_of_another_type_is_refused(run_folder: Path, tmp_path: Path) -> None:
    with safe_open(str(run_folder / "model.ptq"), framework="pt") as file:
        text = file.metadata()["lightning_ptq"]
    tensors = load_file(str(run_folder / "model.ptq"))
    tensors["weights"] = tensors["weights"].to(torch.int16)
    save_file(tensors, str(tmp_path / "bad.ptq"), {"lightning_ptq": text, "sha256": digest(tensors, text)})
    with pytest.raises(PTQError, match="'weights' differs"):
        ptq.load_packed(tmp_path / "bad.ptq", TinyNet())


# ---- configs ----


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_a_config_s_python_tags_are_not_run(tmp_path: Path, tag: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(Path(QUICKSTART).read_text() + f"\nseed_everything: {tag} [{str(tmp_path / 'ran')!r}]\n")
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "--config", str(config)])
    assert exit_.value.code == 2
    assert "python/object" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
