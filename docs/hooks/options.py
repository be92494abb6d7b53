"""A hook of MkDocs: the page of all options, made from the command line's own parser, so that it is never out of date.

`python docs/hooks/options.py` prints the page.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from docstring_parser import parse
from jsonargparse import capture_parser
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import lightning_ptq
from lightning_ptq.cli import main
from lightning_ptq.help import COMMANDS, EXIT_CODES, PROGRAM

PAGE = "options.md"
DATA = ("ImageFolderData", "CIFAR10Data", "DigitsData")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to those that are files."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """Every command and every option, as Markdown."""
    parser: Any = capture_parser(main, [])
    below = parser._subcommands_action.choices
    parts = [
        "# All options\n",
        f"Made from the parser of `{PROGRAM}`: defaults and texts are those of the code. `COMMAND --help WORD` says "
        "the same in a terminal. In a config, `--model.quant.act_bits 4` is `model: {quant: {act_bits: 4}}`. `null` "
        "leaves the value to a rule, which the text names.\n",
    ]
    groups = {"model.": "Model and method", "model.quant.": "Bits and ranges", "model.critic.": "Contrastive term"}
    groups["model.augment."] = "Images changed at random"
    actions = [action for action in below["fit"]._actions if action.option_strings and "-->" not in str(action)]
    for prefix, title in groups.items():
        mine = (a for a in actions if a.dest.startswith(prefix) and "." not in a.dest[len(prefix) :])
        parts += [f"\n## {title}\n", *_table(mine)]
    for name in DATA:
        parts += [f"\n## Images: lightning_ptq.{name}\n", *_signature_table(getattr(lightning_ptq, name))]
    parts.append("\n## Commands\n")
    for name, (what, example) in COMMANDS.items():
        parts += [f"\n### {name}\n", f"{what[0].upper()}{what[1:]}.\n", f"    {PROGRAM} {example}\n"]
        own = [a for a in below[name]._actions if "." not in a.dest and a.dest not in ("config", "data", "help")]
        parts += _table(a for a in own if a.help != argparse.SUPPRESS and not _is_about_itself(a))
    trainer = (a for a in actions if a.dest.startswith("trainer."))
    parts += ["\n## Trainer\n", "Lightning's own, with Lightning's texts; all commands take them.\n", *_table(trainer)]
    parts += ["\n## Exit codes\n", EXIT_CODES, ""]
    return "\n".join(parts)


def _is_about_itself(action: argparse.Action) -> bool:
    return isinstance(action, argparse._HelpAction) or action.dest in ("print_config", "model", "trainer")


def _table(actions: Iterator[argparse.Action]) -> list[str]:
    coordinates = _texts(lightning_ptq.Method)
    rows = [
        _row(
            action.option_strings[0] if action.option_strings else action.dest.upper(),
            action.default,
            action.help or f"{coordinates[action.dest.split('.')[-1]]} `null`: as the method has it.",
        )
        for action in actions
        if action.help != "Path to a configuration file." and not action.dest.endswith(".help")
    ]
    return ["| option | default | meaning |", "|---|---|---|", *rows, ""] if rows else []


def _signature_table(kind: type) -> list[str]:
    texts = _texts(kind)
    found = inspect.signature(kind).parameters.values()
    rows = (_row(f"--data.{p.name}", "required" if p.default is p.empty else p.default, texts[p.name]) for p in found)
    return ["| option | default | meaning |", "|---|---|---|", *rows, ""]


def _texts(kind: type) -> dict[str, str]:
    """What the docstring of a class says of its arguments."""
    return {param.arg_name: param.description or "" for param in parse(kind.__doc__ or "").params}


def _row(name: str, default: Any, text: str | None) -> str:
    if default is None or isinstance(default, bool):
        default = {None: "null", True: "true", False: "false"}[default]
    shown = "" if default == argparse.SUPPRESS else f"`{default}`"
    meaning = re.sub(r"`*\bNone\b`*", "`null`", " ".join((text or "").split())).replace("|", chr(92) + "|")
    return f"| `{name}` | {shown} | {meaning} |"


if __name__ == "__main__":
    sys.stdout.write(page())
