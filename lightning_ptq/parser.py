"""The command line's parser: help that fits a screen, the nearest name for a wrong one, version, shell completion."""

from __future__ import annotations

import argparse
import inspect
import platform
import re
import sys
import traceback
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from importlib import import_module
from textwrap import dedent
from typing import Any, NoReturn

import lightning as L
import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from lightning_ptq.errors import PTQError
from lightning_ptq.fingerprint import VERSION

PROGRAM = "lightning-ptq"
# What a command is for, and one example of it.
COMMANDS = {
    "fit": ("calibrate a quantized copy of a trained network", "fit --config configs/quickstart.yaml"),
    "validate": (
        "compare the quantized network with the original on the validation images",
        "validate --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt",
    ),
    "test": (
        "the same on the test images",
        "test --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt",
    ),
    "predict": (
        "write the quantized network's outputs to predictions.pt",
        "predict --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt",
    ),
    "plan": (
        "show what would be quantized, without calibrating anything",
        "plan --config configs/quickstart.yaml",
    ),
    "sensitivity": (
        "show what each tensor costs at 2, 3, 4, 5, 6 and 8 bits, and the best mixtures",
        "sensitivity --config configs/quickstart.yaml",
    ),
    "export": (
        "write a file that runtimes read, and compare it with the simulation",
        "export --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt --output model.onnx",
    ),
    "compare": (
        "compare two files of one network: classes, accuracy, size and time",
        "compare --config RUN/config.yaml float model.onnx",
    ),
    "report": ("draw the report of a run, or of several side by side", "report RUN"),
}
OPTIONS = "[--config FILE] [--OPTION VALUE ...]"
USAGE = {name: f"{PROGRAM} {name} {OPTIONS}{' FIRST SECOND' * (name == 'compare')}" for name in COMMANDS}
# What most runs need, in the order in which it is asked for. Those that a command lacks it does not show.
COMMON = {
    "config": "settings as YAML; options after it win",
    "first": "a .onnx, .pt2, .ptq or .ckpt file, or float: the model itself",
    "second": "another one",
    "ckpt_path": "a run's checkpoints/last.ckpt; last: the newest one",
    "output": "file to write: .onnx, .pt2 or .ptq",
    "overwrite": "replace a file that is there",
    "least_agreement": "exit with 1 if fewer percent of the classes agree",
    "model.model": "torchvision's name, or import path of a function",
    "model.weights": "state dict, or name of torchvision's weights",
    "model.quant.weight_bits": "2 to 8",
    "model.quant.act_bits": "2 to 8, or 16",
    "model.method": "nearest, adaround, brecq, qdrop, pdquant, flexround",
    "model.contrastive": "add the contrastive term",
    "model.steps_per_unit": "the budget: optimisation steps of each unit",
    "data": "lightning_ptq.ImageFolderData, CIFAR10Data, or yours",
    "data.root": "folder of images: calib/ and val/<class>/",
    "trainer.accelerator": "cpu or gpu",
    "trainer.devices": "how many",
    "trainer.default_root_dir": "the run folder lies below it",
    "seed_everything": "seed of all that is drawn at random",
}
# What a finished run's config and checkpoint have decided.
_DECIDED = ("model.quant", "model.method", "model.contrastive", "model.steps_per_unit")
EXIT_CODES = """\
    0      done
    1      done, but a file is not as good as it has to be (export, compare)
    2      wrong input, or a full disk
    3      an error that nobody foresaw
    130    Ctrl+C: a fit leaves a checkpoint, unless your Trainer brings its own checkpoint callbacks
    141    nobody reads the output any more
    143    SIGTERM: the same"""


class _Help(argparse._HelpAction):
    """`--help` alone fits a screen; `--help WORD` has every option with WORD in its name, `--help all` all of them."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, argparse.SUPPRESS, "show this; with WORD, details")
        self.nargs, self.metavar = "?", "WORD"

    def __call__(self, parser: Any, namespace: Any, word: Any, option_string: str | None = None) -> None:
        sys.stdout.write(parser.help_of(word))
        parser.exit()


class _Version(argparse._HelpAction):
    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        sys.stdout.write(f"{version_text()}\n")
        parser.exit()


class _Debug(argparse._HelpAction):
    """Accepted anywhere; who reports errors looks for it."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Completion(argparse._HelpAction):
    """Prints a script for the shell named."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, argparse.SUPPRESS, "print a completion script")
        self.nargs, self.metavar = None, "SHELL"

    def __call__(self, parser: Any, namespace: Any, shell: Any, option_string: str | None = None) -> None:
        try:
            shtab: Any = import_module("shtab")
        except ImportError:
            parser.error('--completion needs shtab: pip install "lightning-ptq[completion]".')
        if shell not in shtab.SUPPORTED_SHELLS:
            parser.error(f"--completion {shell}: choose one of {', '.join(shtab.SUPPORTED_SHELLS)}.")
        for action in _actions(parser):
            action.help = argparse.SUPPRESS if action.help == argparse.SUPPRESS else _first_line(action.help)
        sys.stdout.write(f"{shtab.complete(parser, shell)}\n")
        parser.exit()


class _Formatter(DefaultHelpFormatter):
    """Without every subclass of `nn.Module` that happens to be imported."""

    def _expand_help(self, action: argparse.Action) -> str:
        return re.sub(r",? known subclasses: [^)]*", "", str(super()._expand_help(action)))


# Options of some subcommands: the others would refuse a config that has them.
NOT_EVERYWHERE = ("ckpt_path", "weights_only")


class CommandParser(LightningArgumentParser):
    """What a subcommand can't do without is given by position: `compare A B`."""

    path = ""  # of the config that is read

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, add_help=False, formatter_class=_Formatter)
        self.add_argument("-h", "--help", action=_Help)
        self.add_argument("--debug", action=_Debug, help="show where an error comes from")
        self.add_argument("--version", action=_Version, help="print versions")
        self.add_argument("--completion", action=_Completion)

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """As Lightning calls it, which names the arguments only."""
        added: list[str] = super().add_method_arguments(*args, **kwargs, as_positional=True)
        return added

    def help_of(self, word: str | None) -> str:
        """The short help, the options with `word` in their names, or with "all" everything."""
        command = self.prog.split()[-1]
        if word == "all" or (word is None and command == "report"):  # that is a short one
            return str(self.format_help())
        if word is None:
            return _command_help(command, self) if command in COMMANDS else _program_help()
        hidden = [action for action in self._actions if not any(word in name for name in action.option_strings)]
        if len(hidden) == len(self._actions):
            self.error(f"no option of {command} has {word!r} in its name. --help all lists all of them.")
        helps = [action.help for action in hidden]
        try:
            for action in hidden:
                action.help = argparse.SUPPRESS
            return str(self.format_help())
        finally:
            for action, text in zip(hidden, helps, strict=True):
                action.help = text

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """A config as YAML, without those of `NOT_EVERYWHERE` that are not given."""
        unset = [key for key in NOT_EVERYWHERE if cfg.get(key, ...) is None]
        if unset:
            cfg = cfg.clone()
            for key in unset:
                cfg.pop(key)
        return str(super().dump(cfg, *args, **kwargs))

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse, whose errors do not name the file."""
        self.path = str(cfg_path)
        return super().parse_path(cfg_path, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line and exit code 2; with --debug behind a traceback."""
        if not self.exit_on_error:  # one of several attempts
            super().error(message, ex)
        if ex is not None and "--debug" in sys.argv:
            traceback.print_exception(ex)
        # What a datamodule refuses comes wrapped.
        told = ex.__cause__ if ex is not None and isinstance(ex.__cause__, PTQError) else None
        parser = getattr(ex, "subcommand_parser", None) or self
        known = told or _missing(message, parser) or _no_settings(message, ex, self.path)
        text = known or f"{_one_line(message)}{_suggestion(message, parser)}"
        sys.stderr.write(f"{PROGRAM}: error: {text}\n")
        self.exit(2)


def version_text() -> str:
    """Versions of what decides a result."""
    cuda = torch.version.cuda or "no CUDA"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{PROGRAM} {VERSION}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {L.__version__}, CUDA {cuda}, {gpu}"
    )


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that is most like `word`, as a whole or in its last part; None if none is like it.

    Of several that have the whole of it for a part, like the `bits` of weights and activations, the nearest three.
    """
    names = list(names)
    group, last = _parts(word)

    def likeness(name: str) -> float:
        whole, own = (SequenceMatcher(None, *pair).ratio() for pair in ((word, name), (last, _parts(name)[1])))
        within = 0.8 * (len(last) > 3 and last in _parts(name)[1])
        return max(whole, own, within) + 0.1 * whole

    ranked = sorted(names, key=likeness, reverse=True)
    having = [name for name in ranked if last in _parts(name)[1].split("_")]
    beside = [name for name in having if _parts(name)[0] == group] or having
    found = beside[:3] or [name for name in ranked[:1] if likeness(name) > 0.8]
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1]))) if found else None


def _parts(name: str) -> tuple[str, str]:
    """The group of an option, and its own name in it."""
    group, _, last = name.lstrip("-").rpartition(".")
    return group, last


def _program_help() -> str:
    commands = "\n".join(f"    {name:<14}{what}" for name, (what, _) in COMMANDS.items())
    return dedent(
        """\
        usage: {program} COMMAND {options}

        Post-training quantization of vision networks.

        example: a 2-bit network in a minute
            {program} fit --config configs/quickstart.yaml

        commands:
        {commands}

        options:
            COMMAND --help          what most runs need, and an example
            COMMAND --help WORD     every option with WORD in its name; all: all of them
            --version               versions of this, Python, torch, lightning and CUDA
            --completion SHELL      print a completion script for bash, zsh or tcsh
            --debug                 show where an error comes from

        exit codes:
        {codes}
        """
    ).format(program=PROGRAM, options=OPTIONS, commands=commands, codes=EXIT_CODES)


def _command_help(command: str, parser: argparse.ArgumentParser) -> str:
    what, example = COMMANDS[command]
    actions = {action.dest: action for action in parser._actions}
    own = {
        name: text
        for name, text in COMMON.items()
        if (name in actions or name.startswith("data."))
        and (command in ("fit", "plan", "sensitivity") or not name.startswith(_DECIDED))
    }
    rows = (f"    {_named(name, actions):<28}{text}{_default(actions.get(name))}" for name, text in own.items())
    return "\n".join(
        (
            f"usage: {USAGE[command]}",
            f"\n{what[0].upper()}{what[1:]}.",
            f"\nexample:\n    {PROGRAM} {example}",
            "\nwhat most runs need:",
            *rows,
            "\nall the rest:",
            "    --help WORD                 options with WORD in their names: quant, critic, augment, trainer",
            f"    --help all                  all {sum(bool(a.option_strings) for a in parser._actions)} of them",
            "    --data.help CLASS           options of your images: lightning_ptq.ImageFolderData",
            "    --print_config              all settings as YAML, with their defaults",
            "    --debug                     show where an error comes from",
            "",
        )
    )


def _named(name: str, actions: dict[str, argparse.Action]) -> str:
    return f"--{name}" if name not in actions or actions[name].option_strings else name.upper()


def _default(action: argparse.Action | None) -> str:
    value = None if action is None else action.default
    return f" ({str(value).lower()})" if isinstance(value, str | int | float) and value != argparse.SUPPRESS else ""


def _first_line(text: str | None) -> str:
    return re.split(r"[.;:(]\s|\n", text or "")[0].replace("%", "")[:60]


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)


# What jsonargparse says besides, of a value that could be of several types.
_BESIDES = ("Does not validate against", "Subtypes:", "Errors:", "Given value", "Expected a path but")
_OTHER_TYPES = ("Expected a <class 'NoneType'>", "Expected a <class 'str'>")


def _one_line(message: str) -> str:
    lines = (line.strip().removeprefix("- ") for line in message.splitlines())
    kept = (line for line in lines if not line.startswith(_BESIDES) and line not in _OTHER_TYPES)
    text = " ".join(filter(None, kept))
    for pattern, plain in (
        (r'^Parser key "([\w.]+)":', r"\1:"),
        (r"Problem with given class_path '([\w.]+)':", r"\1:"),
        (r"(?:an? )?typing\.Literal\[(.*?)\]", r"one of \1"),
        (r"<class '([\w.]+)'>", r"\1"),
    ):
        text = re.sub(pattern, plain, text)
    return text if text.endswith(".") else f"{text}."


# What a command can't do without, as its help has it.
_NEEDED = {"data": "images", "first": "FIRST", "second": "SECOND", "runs": "RUN, a folder that a fit has left"}


def _missing(message: str, parser: argparse.ArgumentParser) -> str | None:
    """What jsonargparse finds missing, and how to give it; None if the message is of something else."""
    found = re.match(r"the following arguments are required: ([\w., ]+)", message)
    command = "" if found is None else found[1].split(".")[0] if "." in found[1] else parser.prog.split()[-1]
    if found is None or command not in COMMANDS:
        return None
    names = [name.removeprefix(f"{command}.") for name in found[1].split(", ")]
    needed = f"{command} needs {' and '.join(_NEEDED.get(name, name) for name in names)}"
    if "data" not in names:
        return f"{needed}. For example: {PROGRAM} {COMMANDS[command][1]}"
    config = "RUN/config.yaml" if "RUN/config.yaml" in COMMANDS[command][1] else "FILE"
    return f"{needed}: give --config {config}, or --model.model and --data."


def _no_settings(message: str, error: Exception | None, path: str) -> str | None:
    """Which line of the config at `path` is no YAML, or that it is something else; None if the message is not that."""
    if message.startswith("Unexpected config: ") and path:
        return f"config={path!r} holds no settings. Give a YAML file of names and values."
    cause: Any = error.__cause__ if error is not None else None
    mark = getattr(cause, "problem_mark", None)
    if mark is None:
        return None
    within = f" ({cause.context})" if cause.context else ""
    return f"config={path!r}, line {mark.line + 1}: {cause.problem}{within}. Mend the YAML there."


def _suggestion(message: str, parser: argparse.ArgumentParser) -> str:
    """The nearest right name for the wrong one in a message, and where to find the others."""
    options = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    command = f"{PROGRAM} {parser.prog.split()[-1]}".removesuffix(f" {PROGRAM}")
    if wrong := re.search(r"unrecognized arguments:.*?(--[^\s=]+)|does not accept option '([^']+)'", message):
        word = wrong[1] or f"--{wrong[2]}"
        found = nearest(word, options)
        return f" Did you mean {found}?" if found else f" {command} --help all lists what there is."
    if wrong := re.search(r"invalid choice: '([^']+)'", message):
        return "".join(f" Did you mean {name}?" for name in get_close_matches(wrong[1], COMMANDS, n=1, cutoff=0.5))
    if message.startswith('expected "subcommand"'):
        return f" {PROGRAM} --help says what each does."
    path = re.search(r"class_path '([\w.]+)'", message)
    if path and (wrong := re.search(r"Option '([^']+)' is not accepted|no attribute '([^']+)'", message)):
        owner, _, name = path[1].rpartition(".")
        try:
            module = import_module(owner)
        except ImportError:  # a module of another name; what it might be called is not searched for
            return ""
        names: Iterable[str] = inspect.signature(getattr(module, name)).parameters if wrong[1] else dir(module)
        found = nearest(wrong[1] or wrong[2], [name for name in names if not name.startswith("_")])
        return f" Did you mean {found}?" if found else ""
    return ""
