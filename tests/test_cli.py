"""The command line as a user meets it: every shipped config, every subcommand, every message."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from lightning_ptq import DigitsData, PTQError
from lightning_ptq.cli import main, warning_line
from lightning_ptq.models import resnet20

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
CIFAR10 = sorted((ROOT / "configs" / "cifar10").glob("*.yaml"))
PAPER = ROOT / "configs" / "paper.yaml"
IMAGENET = sorted((ROOT / "configs" / "imagenet").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart names its weights relative to the checkout."""
    monkeypatch.chdir(ROOT)


def run(command: str, config: Path, *args: object) -> None:
    main([command, "--config", str(config), *map(str, args)])


def quickstart(folder: Path, *args: object) -> None:
    """A short fit of the quickstart into `folder`."""
    run("fit", QUICKSTART, "--model.steps_per_unit=5", f"--trainer.default_root_dir={folder}",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=5", *args)  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run folder of a finished fit, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("quickstart"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(ROOT)
        quickstart(folder)
    (summary,) = folder.rglob("summary.json")
    return summary.parent, printed.getvalue()


@pytest.fixture
def finished(fitted: tuple[Path, str]) -> Path:
    """Its run folder alone."""
    return fitted[0]


def test_sensitivity_prints_the_front_and_leaves_it_in_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("sensitivity", QUICKSTART, f"--trainer.default_root_dir={tmp_path}")
    assert "average_bits" in capsys.readouterr().out
    front = json.loads((tmp_path / "sensitivity.json").read_text())["front"]
    assert [point["average_bits"] for point in front][:2] == [2.0, 2.5]
    assert (tmp_path / "sensitivity.png").exists()


def test_a_network_beside_the_caller_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside_me.py").write_text("from lightning_ptq.models import digits_net as build\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    main(["plan", "--model.model=beside_me.build", "--data=lightning_ptq.DigitsData"])
    assert "units for 512 calibration images of shape 1x8x8" in capsys.readouterr().out


def student_top1(text: str) -> float:
    """The number behind `student_top1` in the table that validate and test print."""
    found = re.search(r"student_top1\D+([\d.]+)", text.replace("│", " "))
    assert found, text
    return float(found[1])


# ---- every subcommand on the quickstart ----


def test_fit_leaves_a_complete_run_folder_and_prints_the_result(fitted: tuple[Path, str]) -> None:
    folder, printed = fitted
    assert {"config.yaml", "summary.json", "checkpoints"} <= {entry.name for entry in folder.iterdir()}
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["teacher_top1"] == pytest.approx(98.87, abs=0.01)
    for row in ("teacher, float32", "nearest, W2A2", "qdrop + contrastive, W2A2"):
        assert row in printed
    assert f"{summary['student_top1']:.2f}" in printed
    assert str(folder / "summary.json") in printed


@pytest.mark.parametrize("command", ["validate", "test"])
def test_the_saved_config_and_checkpoint_give_the_same_accuracy(
    finished: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = json.loads((finished / "summary.json").read_text())["student_top1"]
    run(command, finished / "config.yaml", f"--ckpt_path={finished / 'checkpoints' / 'last.ckpt'}",
        f"--trainer.default_root_dir={tmp_path}")  # fmt: skip
    assert student_top1(capsys.readouterr().out) == pytest.approx(expected, abs=1e-3)


def test_predict_writes_the_student_s_outputs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("predict", finished / "config.yaml", f"--ckpt_path={finished / 'checkpoints' / 'last.ckpt'}",
        f"--trainer.default_root_dir={tmp_path}")  # fmt: skip
    (path,) = tmp_path.rglob("predictions.pt")
    assert f"predictions: {path}" in capsys.readouterr().out
    outputs = torch.load(path, weights_only=True)
    labels = torch.cat([y for _, y in DigitsData().val_dataloader()])
    top1 = 100 * (outputs.argmax(1) == labels).float().mean().item()
    assert top1 == pytest.approx(json.loads((finished / "summary.json").read_text())["student_top1"], abs=1e-3)


def test_a_finished_fit_that_is_continued_repeats_its_result(finished: Path, tmp_path: Path) -> None:
    quickstart(tmp_path, f"--ckpt_path={finished / 'checkpoints' / 'last.ckpt'}")
    (summary,) = tmp_path.rglob("summary.json")
    expected, found = (json.loads(path.read_text()) for path in (finished / "summary.json", summary))
    for key in ("teacher_top1", "nearest_top1", "student_top1", "teacher_agreement", "nearest_agreement", "units"):
        assert found[key] == expected[key]


def test_an_interrupted_fit_is_resumed_to_the_same_result(finished: Path, tmp_path: Path) -> None:
    quickstart(tmp_path / "stopped", "--trainer.max_epochs=2")
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    quickstart(tmp_path / "resumed", f"--ckpt_path={checkpoint}")
    (summary,) = (tmp_path / "resumed").rglob("summary.json")
    expected, found = (json.loads(path.read_text()) for path in (finished / "summary.json", summary))
    assert [unit["mse_after"] for unit in found["units"]] == [unit["mse_after"] for unit in expected["units"]]
    assert found["student_top1"] == expected["student_top1"]


def test_one_command_begins_and_goes_on(finished: Path, tmp_path: Path) -> None:
    quickstart(tmp_path, "--ckpt_path=last", "--trainer.max_steps=12")
    quickstart(tmp_path, "--ckpt_path=last")
    (summary,) = (json.loads(path.read_text()) for path in tmp_path.rglob("summary.json") if "version_1" in str(path))
    expected = json.loads((finished / "summary.json").read_text())
    assert summary["complete"]
    assert summary["student_top1"] == expected["student_top1"]
    assert [unit["mse_after"] for unit in summary["units"]] == [unit["mse_after"] for unit in expected["units"]]
    with pytest.raises(PTQError, match=r"no last.ckpt is below .*nowhere"):
        run(
            "validate",
            finished / "config.yaml",
            "--ckpt_path=last",
            f"--trainer.default_root_dir={tmp_path / 'nowhere'}",
        )


def test_a_folder_that_holds_a_run_is_left_alone(finished: Path) -> None:
    before = {name: (finished / name).read_bytes() for name in ("summary.json", "config.yaml", "checkpoints/last.ckpt")}
    with pytest.raises(PTQError, match="already holds a run"):
        quickstart(finished, "--trainer.logger=false", "--model.quant.act_bits=4")
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_a_folder_that_holds_a_run_is_continued_with_its_checkpoint(tmp_path: Path) -> None:
    quickstart(tmp_path, "--trainer.logger=false", "--trainer.max_epochs=2")
    quickstart(tmp_path, "--trainer.logger=false", f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}")
    assert len(json.loads((tmp_path / "summary.json").read_text())["units"]) == 6


def test_lightnings_noise_is_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quickstart(tmp_path, "--trainer.enable_progress_bar=true", "--trainer.fast_dev_run=true")
    assert not [r for r in caplog.messages if "Tip:" in r or "will override" in r or "max_epochs" in r]


def test_the_help_names_this_program_and_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lightning-ptq ")
    for command in ("fit", "validate", "test", "predict", "plan", "report"):
        assert re.search(rf"^    {command} ", printed, re.MULTILINE)


# ---- every shipped config ----


@pytest.fixture
def small_images(tmp_path: Path, write_image: Callable[..., Path]) -> Path:
    """Folder with calib/ and train/ (8 images each) and val/ (ten classes), 32x32 pixels."""
    for seed in range(8):
        for name in ("calib", "train/cat"):
            write_image(tmp_path / "images" / name / f"{seed}.jpg", size=(32, 32), seed=seed)
    for label in range(10):
        write_image(tmp_path / "images" / "val" / str(label) / "0.jpg", size=(32, 32), seed=10 + label)
    return tmp_path / "images"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of an untrained resnet20."""
    torch.save(resnet20().state_dict(), tmp_path / "resnet20.pt")
    return tmp_path / "resnet20.pt"


def small_fit(config: Path, folder: Path, *args: object) -> None:
    """One batch of everything, on the CPU."""
    run("fit", config, "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--model.batch_size=4",
        "--data.calibration_samples=8", f"--trainer.default_root_dir={folder}", *args)  # fmt: skip


def test_the_configs_are_all_covered_here() -> None:
    assert {QUICKSTART, PAPER, *CIFAR10, *IMAGENET} == set((ROOT / "configs").rglob("*.yaml"))
    assert CIFAR10
    assert IMAGENET


def test_the_quickstart_runs_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run("fit", QUICKSTART, "--trainer.fast_dev_run=true", f"--trainer.default_root_dir={tmp_path}")
    assert "Trainable params" not in capsys.readouterr().out + caplog.text
    assert not list(tmp_path.iterdir()), "fast_dev_run leaves nothing behind"


def test_lightnings_table_of_the_model_is_there_for_who_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    asked = ("--trainer.enable_model_summary=true", "--trainer.callbacks=lightning.pytorch.callbacks.ModelSummary")
    for option in asked:
        run("fit", QUICKSTART, "--trainer.fast_dev_run=true", f"--trainer.default_root_dir={tmp_path}", option)
        assert "Trainable params" in capsys.readouterr().out + caplog.text
        caplog.clear()


@pytest.mark.parametrize("config", CIFAR10, ids=lambda path: path.stem)
def test_the_cifar10_configs_run_on_a_folder_of_images(
    config: Path, small_images: Path, weights: Path, tmp_path: Path
) -> None:
    small_fit(config, tmp_path / "run", f"--data.root={small_images}", f"--model.weights={weights}")


def test_the_papers_settings_take_the_place_of_another_config_s(tmp_path: Path) -> None:
    quickstart(tmp_path, "--config", PAPER, "--model.steps_per_unit=5", "--model.method=brecq")
    summary = json.loads(next(tmp_path.rglob("summary.json")).read_text())
    settings = summary["settings"]
    assert (settings["corrections"], settings["network_steps"], settings["drop_until"]) == (False, 0, 1.0)
    assert (settings["weighting"], settings["rounding_weight"]) == ("equal", 0.01)
    assert summary["method"] == "brecq"


def test_plan_tries_eight_bits_with_the_real_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("plan", QUICKSTART)
    printed = capsys.readouterr().out
    assert "with 8 bits everywhere, rounded to nearest, 64 of 512 images for a quick look: 100.0 % agreement" in printed
    assert re.search(r"^caches: [\d.]+ MiB at most \(unit 'layer1'\), in host memory; budget half", printed, re.M)
    state = torch.load(ROOT / "lightning_ptq" / "demo" / "digits.pt", weights_only=True)
    state["layer1.0.bn1.weight"][0] *= 1e4
    state["layer1.0.conv2.weight"][:, 0] = 0
    torch.save(state, tmp_path / "broken.pt")
    run("plan", QUICKSTART, f"--model.weights={tmp_path / 'broken.pt'}")
    assert (
        "warning: that is little for 8 bits. What costs most: what 'layer1.0.conv2' reads (" in capsys.readouterr().out
    )
    run("plan", QUICKSTART, "--model.weights=nowhere.pt", "--model.cache=host", "--model.memory_budget=1MB")
    printed = capsys.readouterr().out
    assert "not tried with 8 bits: weights='nowhere.pt' is no file" in printed
    assert "no fit: cache='host' needs" in printed


def test_what_needs_calibration_images_only_goes_without_others_and_says_how_many_there_are(
    small_images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are 8 calibration images of 1024: the plan says so, and what comes later does not say it again."""
    shutil.rmtree(small_images / "val")
    options = ["--model.model=lightning_ptq.models.resnet20", f"--model.weights={weights}",
               "--data=lightning_ptq.ImageFolderData", f"--data.root={small_images}", "--data.resize=null",
               "--data.crop=32"]  # fmt: skip
    with pytest.warns(UserWarning, match="only 8 calibration images") as told:
        main(["plan", *options])
    assert len([warning for warning in told if "calibration_samples=" in str(warning.message)]) == 1
    printed = capsys.readouterr().out
    assert "11 units for 8 calibration images of shape 3x32x32" in printed
    table = [float(mib) for mib in re.findall(r"^ +\d+  \S+ +\S+ +[\d,]+ +([\d.]+)$", printed, re.MULTILINE)]
    images, output = 8 * 3 * 32**2 * 4 / 2**20, 8 * 16 * 32**2 * 4 / 2**20
    most = float(re.findall(r"^caches: ([\d.]+) MiB at most", printed, re.MULTILINE)[0])
    assert most == pytest.approx(max(table) + images + output, abs=0.11)
    assert "and where a unit ends its output once more" in printed
    assert "rounded to nearest, 8 images: " in printed
    main(["plan", *options, "--data.calibration_samples=5", "--model.held_out=0.5"])
    few = float(re.findall(r"^caches: ([\d.]+) MiB at most", capsys.readouterr().out, re.MULTILINE)[0])
    assert few == pytest.approx(most * 5 / 8, abs=0.11), "two more that judge are too few: a fit does without"
    main(["compare", "float", "float", *options])
    printed = capsys.readouterr().out
    assert "no validation images: compared on those of calibration" in printed
    assert "8 images: 100.00 % of classes agree" in printed
    with pytest.raises(PTQError, match="has no folder 'val'"):
        main(["fit", *options, f"--trainer.default_root_dir={tmp_path / 'run'}"])


@pytest.mark.parametrize("config", IMAGENET, ids=lambda path: path.stem)
def test_the_imagenet_configs_are_planned_without_weights_or_data(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("plan", config)
    printed = capsys.readouterr().out
    assert "1024 calibration images of shape 3x224x224, W4A4, edges 8bit" in printed
    for layer in ("conv1 ", "layer1.0.conv1", "layer4.1.conv2", "fc "):
        assert layer in printed
    assert "not tried with 8 bits: weights=" in printed


def test_the_resnet18_config_runs_on_a_folder_of_images(small_images: Path, tmp_path: Path) -> None:
    (config,) = (path for path in IMAGENET if "resnet18" in path.stem)
    untrained = pytest.warns(UserWarning, match="no weights are given for 'resnet18', so it has random ones")
    with untrained, pytest.warns(UserWarning, match="are of 10 classes, and the network has 1000 outputs"):
        small_fit(config, tmp_path / "run", f"--data.root={small_images}", "--model.weights=null", "--data.resize=36",
                  "--data.crop=32", "--data.num_workers=0")  # fmt: skip


# ---- errors ----


def test_from_the_shell_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lightning_ptq", "fit", "--config", QUICKSTART, "--model.weights=nowhere.pt",
         f"--trainer.default_root_dir={tmp_path}"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2
    *_, line = result.stderr.splitlines()
    assert line.startswith("lightning-ptq: error: weights='nowhere.pt' is no file, seen from ")
    assert "Traceback" not in result.stderr


def test_a_warning_looks_like_an_error_and_debug_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "plan",
        "--config",
        QUICKSTART,
        "--data.calibration_samples=2000",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "lightning_ptq", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (line,) = [line for line in result.stderr.splitlines() if "2000" in line]
    assert line.startswith("lightning-ptq: warning: data.calibration_samples=2000, but there are only 1000 calibration")
    monkeypatch.setattr(sys, "argv", ["lightning-ptq", "--debug"])
    assert warning_line(UserWarning("few\nimages"), UserWarning, "a.py", 3) == (
        "lightning-ptq: warning: few images (a.py:3)\n"
    )


def test_the_installed_command_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (value,) = re.findall(r'^lightning-ptq = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    command = EntryPoint("lightning-ptq", value, "console_scripts").load()
    arguments = ["fit", "--config", QUICKSTART, "--model.weights=nowhere.pt", f"--trainer.default_root_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["lightning-ptq", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        command()
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("lightning-ptq: error: weights='nowhere.pt' is no file, seen from ")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.quant.weight_bits=9", r"weight_bits=9 .*2 to 8"),
        ("--model.quant.act_bits=1", r"act_bits=1 .*2 to 8, or 16"),
        ("--model.steps_per_unit=0", r"steps_per_unit=0 .*1 or more"),
        ("--model.leaf_modules=[conv]", r"leaf_modules.*'conv'"),
        ("--model.weights=nowhere.pt", r"weights='nowhere.pt' is no file"),
        ("--model.weights=configs", r"weights='configs' is no file"),
        ("--model.model=resnet99", r"model='resnet99' .*Unknown model"),
        ("--model.model=resnet20", r"Unknown model resnet20\. Did you mean lightning_ptq\.models\.resnet20\? Name"),
        ("--model.model=resnet-18", r"Did you mean resnet18\?"),
        ("--model.model=lightning_ptq.models.resnet99", r"'lightning_ptq.models.resnet99' can't be imported"),
        ("--model.model=nowhere.resnet", r"'nowhere.resnet' can't be imported"),
        ("--model.model=.resnet", r"'.resnet' can't be imported"),
        ("--model.model=lightning_ptq.config.check_bits", r"check_bits' can't be called without arguments"),
        ("--model.model=lightning_ptq.QuantConfig", r"returned QuantConfig, not a torch.nn.Module"),
        ("--trainer.precision=bf16-true", r"precision='bf16-true' .*32-true"),
        ("--data.calibration_samples=0", r"calibration_samples=0 is too small"),
        ("--data.calibration_samples=16", r"batch_size=32 .*16 calibration images"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(PTQError, match=message):
        quickstart(tmp_path, option)
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_printed_config_is_one_for_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quickstart(tmp_path, "--print_config")
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    run("plan", printed)
    assert "units for 512 calibration images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ("--model.method=magic", "'nearest', 'adaround', 'brecq', 'qdrop', 'pdquant'"),
        ("--model.quant.weight_bits=four", "a whole number"),
        ("--model.quant.edges=16bit", "'8bit', 'same'"),
        ("--model.cache=ram", "'auto', 'device', 'host', 'disk'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_the_choices(
    tmp_path: Path, option: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        quickstart(tmp_path, option)
    assert exit_.value.code == 2
    stderr = capsys.readouterr().err
    assert option.partition("=")[2] in stderr
    assert rule in stderr


def test_a_missing_data_folder_is_named(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(PTQError, match=r"data.root='.*nowhere' is not a folder"):
        small_fit(CIFAR10[0], tmp_path, f"--data.root={tmp_path / 'nowhere'}", f"--model.weights={weights}")


def test_the_cifar10_configs_never_calibrate_an_untrained_network(tmp_path: Path, small_images: Path) -> None:
    with pytest.raises(PTQError, match=r"weights='resnet20.pt' is no file"):
        small_fit(CIFAR10[0], tmp_path, f"--data.root={small_images}")


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_that_is_not_there_is_named_before_anything_is_built(command: str) -> None:
    with pytest.raises(PTQError, match=r"ckpt_path='gone/last\.ckpt' is no file, seen from"):
        main([command, "--config", "configs/quickstart.yaml", "--ckpt_path", "gone/last.ckpt"])


def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "damaged.ckpt").write_text("hi\n")
    with pytest.raises(PTQError, match=r"damaged.ckpt' can't be read.*Give a fit's checkpoints/last.ckpt"):
        quickstart(tmp_path / "run", f"--ckpt_path={tmp_path / 'damaged.ckpt'}")


def test_images_with_other_channels_are_refused_in_one_sentence(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(PTQError, match=r"images of shape \(1, 8, 8\) do not fit the model: unit 'conv1'.*channels"):
        main(["fit", "--model.model=lightning_ptq.models.resnet20", f"--model.weights={weights}",
              "--data=lightning_ptq.DigitsData", f"--trainer.default_root_dir={tmp_path / 'run'}"])  # fmt: skip


def test_report_draws_a_run_again_and_two_side_by_side(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", str(finished), "--output", str(tmp_path / "one.html"), "--layers", "layer1.*"])
    assert f"report: {tmp_path / 'one.html'}" in capsys.readouterr().out
    assert "layer1.0.conv1" in (tmp_path / "one.html").read_text()
    main(["report", str(finished), str(finished), "--output", str(tmp_path / "one.html"), "--overwrite", "true"])
    assert "2 runs side by side" in (tmp_path / "one.html").read_text()
    with pytest.raises(PTQError, match=r"holds no run: there is no summary.json in it"):
        main(["report", str(tmp_path)])


def test_what_runs_between_processes_is_ended_before_python_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads abort a Python that ends, and the launcher then kills the first process, whatever it does."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    monkeypatch.setattr(sys, "argv", ["lightning-ptq", "plan", "--config=configs/quickstart.yaml"])
    monkeypatch.chdir(Path(__file__).parents[1])
    main()
    assert not torch.distributed.is_initialized()
