"""Help that fits a screen and names what there is; the nearest right name for a wrong one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import capture_parser

import lightning_ptq
from lightning_ptq import PTQError
from lightning_ptq.__main__ import main as from_the_shell
from lightning_ptq.cli import main
from lightning_ptq.help import COMMANDS, COMMON, program_help
from lightning_ptq.parse_errors import nearest
from lightning_ptq.parser import CommandParser
from tests.helpers import tiny_images, tiny_module

ROOT = Path(__file__).parents[1]
LINES = 42


@pytest.fixture(scope="module")
def parser() -> Any:
    """The whole command line's."""
    return capture_parser(main, [])


def below(parser: Any) -> dict[str, CommandParser]:
    return dict(parser._subcommands_action.choices)


def names_of(parser: CommandParser) -> set[str]:
    return {name for action in parser._actions for name in (*action.option_strings, action.dest)}


def test_the_help_fits_a_screen_and_has_every_command(parser: Any) -> None:
    text = parser.help_of(None)
    assert len(text.splitlines()) <= LINES
    assert max(map(len, text.splitlines())) <= 100
    assert list(below(parser)) == list(COMMANDS)
    for name, (what, _) in COMMANDS.items():
        assert any(line.split() == [name, *what.split()] for line in text.splitlines())


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "report"])
def test_a_command_s_help_fits_a_screen_and_names_options_that_exist(parser: Any, command: str) -> None:
    found = below(parser)[command]
    text = found.help_of(None)
    assert len(text.splitlines()) <= LINES
    assert max(map(len, text.splitlines())) <= 110
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("    --")]
    assert len(shown) > 10
    # A data set's own options are known when it is named.
    assert {name for name in shown if not name.startswith("--data.")} <= names_of(found)


def test_what_is_shown_is_an_option_of_some_command(parser: Any) -> None:
    every = set().union(*map(names_of, below(parser).values()))
    assert {name for name in COMMON if name not in every} == {"data.root"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_parses(parser: Any, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(COMMANDS[command][1].replace("RUN/config.yaml", "configs/quickstart.yaml"))
    assert parser.parse_args(words).subcommand == command


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_overview_comes_before_torch(option: str) -> None:
    code = "import sys; from lightning_ptq.__main__ import main; main(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
    assert done.stdout == program_help()


def test_nobody_need_read_the_overview() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "lightning_ptq", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_ctrl_c_while_modules_are_imported_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pressed(MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "lightning_ptq.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "lightning_ptq.cli")
    monkeypatch.setattr(sys, "meta_path", [Pressed(), *sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["lightning-ptq", "fit"])
    with pytest.raises(SystemExit) as exit_:
        from_the_shell()
    assert exit_.value.code == 130


@pytest.mark.parametrize("name", ["PTQModule", "graph", "__version__", "__all__"])
def test_names_come_when_they_are_asked_for(name: str) -> None:
    code = f"import sys, lightning_ptq as p; assert 'torch' not in sys.modules; p.{name}; assert '{name}' in dir(p)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_there_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_ptq' has no attribute 'PTQModul'"):
        lightning_ptq.PTQModul  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(lightning_ptq, "a.b")


def test_a_word_finds_the_options_with_it_in_their_names(parser: Any) -> None:
    text = below(parser)["fit"].help_of("critic")
    named = {line.split()[0] for line in text.splitlines() if line.startswith("  --")}
    expected = {name for name in names_of(below(parser)["fit"]) if name.startswith("--model.critic")}
    assert named == expected
    assert len(named) > 10


def test_all_has_every_option_and_no_endless_list_of_classes(parser: Any) -> None:
    text = below(parser)["fit"].help_of("all")
    assert all(name in text for name in names_of(below(parser)["fit"]) if name.startswith("--model."))
    assert "known subclasses" not in text
    assert len(text.splitlines()) < 800


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "--model.step_per_unit=3"], "Did you mean --model.steps_per_unit?"),
        (["fit", "--steps_per_unit", "3"], "Did you mean --model.steps_per_unit?"),
        (["fit", "--weight_bits", "3"], "Did you mean --model.quant.weight_bits?"),
        (
            ["fit", "--model.quant.bits=3"],
            "Did you mean --model.quant.act_bits, --model.quant.weight_bits or --model.quan",
        ),
        (["fit", "--zzz", "3"], "lightning-ptq fit --help all lists what there is."),
        (["fti"], "Did you mean fit?"),
        ([], "lightning-ptq --help says what each does."),
        (["fit", "--help", "zzz"], "no option of fit has 'zzz' in its name"),
        (["fit", "--data", "lightning_ptq.DigitData"], "Did you mean DigitsData?"),
        (["fit", "--data", "lightning_ptq.datas.DigitsData"], "has no attribute 'datas'"),
        (["fit", "--data=lightning_ptq.DigitsData", "--data.samples=8"], "Did you mean calibration_samples?"),
        (["fit", "--model.method=magic"], "model.method=magic is not one of 'nearest', 'adaround'"),
        (
            ["fit", "--model.quant.weight_bits=four"],
            "model.quant.weight_bits=four is not a whole number. Bits of the weights, 2 to 8.",
        ),
        (["fit", "--model.quant.average_bits=nan"], "average_bits=nan is not a number or null. Choose the bits that"),
        (["fit", "--model.rounding_lr=a"], "model.rounding_lr=a is not a number or null. Learning rate of"),
        (
            ["fit", "--model.quant=5"],
            "model.quant=5 is neither a setting nor a YAML file that is there: model.quant has",
        ),
        (["fit", "--model=5"], "like --model.model. lightning-ptq fit --help model. lists them."),
        (["fit", "--model.image_shape=3"], "model.image_shape follows from --data. Leave it out."),
        (["fit", "--model.critic.loss=a"], "is not one of 'infonce', 'nce', 'dcl', 'debiased'. What is minimised."),
        (
            ["fit", "--data=lightning_ptq.DigitsData", "--data.batch_size=8"],
            "Did you mean --model.batch_size or val_batch_size?",
        ),
        (["fit", "--data=5"], "data: Expected a dot import path string: 5."),
        (
            ["fit", "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"],
            "EarlyStopping: the following arguments are required: monitor",
        ),
        (["fit", "--data=lightning_ptq.ImageFolderData"], "required: root. Give --data.root."),
        (
            ["fit", "--data=lightning_ptq.ImageFolderData", "--data.root=x", "--data.mean=[0.5]"],
            "data.mean=[0.5] is not a list of 3. lightning-ptq fit --data.help lightning_ptq.ImageFolderData lists",
        ),
        (
            ["fit", "--data=lightning_ptq.ImageFolderData", "--data.rezise=9"],
            "'rezise' is not accepted. Did you mean resi",
        ),
        (
            ["fit", "--data=lightning_ptq.ImageFolderData", "--data.zzz=9"],
            "'zzz' is not accepted. lightning-ptq fit --data.help lightning_ptq.ImageFolderData lists what it takes.",
        ),
        (["fit", "--config=nowhere.yaml"], "File does not exist"),
        (["fit"], "error: fit needs images: give --config FILE, or --model.model and --data."),
        (
            ["compare", "float", "a.onnx"],
            "compare needs images: give --config RUN/config.yaml, or --model.model and --data.",
        ),
        (["compare", "float"], "compare needs SECOND and images: give --config"),
        (["report"], "report needs RUN, a folder that a fit has left. For example: lightning-ptq report RUN"),
        (["--completion", "dos"], "choose one of bash"),
    ],
)
def test_wrong_words_are_one_line_with_the_way_out(
    parser: Any, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[:1] == ["--completion"]:
        pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(words)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-ptq: error: ")
    assert said in line


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_a_logger_may_have_a_version(parser: Any, logger: str) -> None:
    """An option of the command line has that name too."""
    given = ["--trainer.logger", f"lightning.pytorch.loggers.{logger}", "--trainer.logger.save_dir", "runs"]
    found = parser.parse_args(["plan", "--data", "lightning_ptq.DigitsData", *given, "--trainer.logger.version", "7"])
    assert found.plan.trainer.logger.init_args.version == 7


def test_a_wrong_key_of_a_config_is_treated_alike(
    parser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("model:\n  quant:\n    weight_bit: 3\n")
    with pytest.raises(SystemExit):
        parser.parse_args(["fit", f"--config={tmp_path / 'config.yaml'}"])
    assert "Did you mean --model.quant.weight_bits?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"model:\n  quant:\n    act_bits: 4\n   method: qdrop\n", ", line 4: "),
        (b"model: [\n", ", line 2: "),
        (b"words\n", " holds no settings. Give a YAML file"),
        (b"", " holds no settings. Give a YAML file"),
        ("model:\n".encode("utf-16"), " is not text in UTF-8 (invalid start byte at byte 0). Save it as that."),
    ],
)
def test_a_config_that_is_no_yaml_is_named_with_the_line(
    parser: Any, tmp_path: Path, text: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(SystemExit):
        parser.parse_args(["fit", f"--config={tmp_path / 'config.yaml'}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: config='{tmp_path / 'config.yaml'}'{said}" in line
    assert "<unicode string>" not in line


def test_the_nearest_name_is_like_the_wrong_one_or_none() -> None:
    names = ["--model.steps_per_unit", "--model.network_steps", "--trainer.max_steps"]
    assert nearest("--model.stepsperunit", names) == "--model.steps_per_unit"
    assert nearest("--max_step", names) == "--trainer.max_steps"
    assert nearest("--model.banana", names) is None
    assert nearest("--x", []) is None
    bits = ["--data.bits_of", "--quant.act_bits", "--quant.weight_bits", "--other.bits_per"]
    assert nearest("--quant.bits", bits) == "--quant.act_bits or --quant.weight_bits"
    assert nearest("--critic.bits", bits[:2]) == "--data.bits_of or --quant.act_bits"


def test_the_version_names_what_decides_a_result(parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(["--version"])
    assert exit_.value.code == 0
    (line,) = capsys.readouterr().out.splitlines()
    for version in (f"torch {torch.__version__}", "lightning-ptq ", "lightning ", "CUDA ", "Python "):
        assert version in line


def test_the_completion_script_is_one_that_bash_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as exit_:
        main(["--completion", "bash"])  # a parser of its own: helps are shortened in it
    assert exit_.value.code == 0
    (tmp_path / "complete.sh").write_text(capsys.readouterr().out)
    asked = (
        "source complete.sh; COMP_WORDS=(lightning-ptq fit --model.ste); COMP_CWORD=2; "
        "$(complete -p lightning-ptq | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[@]}"
    )
    found = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(found.stdout.split()) == ["--model.steps_per_batch", "--model.steps_per_unit"]


def test_labels_beside_the_images_are_refused() -> None:
    with pytest.raises(PTQError, match=r"reads images alone, and got 1 more\. Call module\(images\)"):
        tiny_module()(tiny_images(2), torch.zeros(2))


def test_debug_shows_where_a_wrong_word_was_found(
    parser: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--debug", "--model.method=magic"]
    monkeypatch.setattr(sys, "argv", ["lightning-ptq", *words])
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert "Traceback" in capsys.readouterr().err
