"""What `--help` says: of the program, and of each command what most runs need."""

from __future__ import annotations

import argparse
import re
from textwrap import dedent

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
# What a shell reports for a process that SIGPIPE ended; some systems have no such signal.
NO_READER = 128 + 13
EXIT_CODES = """\
    0      done
    1      done, but a file is not as good as it has to be (export, compare)
    2      wrong input, or a full disk
    3      an error that nobody foresaw
    130    Ctrl+C: a fit leaves a checkpoint, but for callbacks of your own
    141    nobody reads the output any more
    143    SIGTERM: the same"""


def program_help() -> str:
    """What `--help` says of the program: its commands, its options and the exit codes."""
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


def command_help(command: str, parser: argparse.ArgumentParser) -> str:
    """What `COMMAND --help` says: what the command is for, an example, and the options that most runs need."""
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


def first_line(text: str | None) -> str:
    return re.split(r"[.;:(]\s|\n", text or "")[0].replace("%", "")[:60]
