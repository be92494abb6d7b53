"""The command line's parser: help that fits a screen, errors of one line, version, shell completion."""

from __future__ import annotations

import argparse
import platform
import re
import sys
import traceback
from collections.abc import Iterable
from importlib import import_module
from typing import Any, NoReturn

import lightning as L
import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from lightning_ptq.errors import PTQError
from lightning_ptq.fingerprint import VERSION
from lightning_ptq.help import COMMANDS, PROGRAM, command_help, first_line, program_help
from lightning_ptq.parse_errors import in_our_words


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
            action.help = argparse.SUPPRESS if action.help == argparse.SUPPRESS else first_line(action.help)
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
        if not self.exit_on_error:  # of a class, whose own arguments may have these names: a logger's version
            return
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
            return command_help(command, self) if command in COMMANDS else program_help()
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
        try:
            return super().parse_path(cfg_path, *args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(str(error), error)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line and exit code 2; with --debug behind a traceback."""
        if not self.exit_on_error:  # one of several attempts
            super().error(message, ex)
        if ex is not None and "--debug" in sys.argv:
            traceback.print_exception(ex)
        # What a datamodule refuses comes wrapped.
        told = ex.__cause__ if ex is not None and isinstance(ex.__cause__, PTQError) else None
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"{PROGRAM}: error: {told or in_our_words(message, ex, parser, self.path)}\n")
        self.exit(2)


def version_text() -> str:
    """Versions of what decides a result."""
    cuda = torch.version.cuda or "no CUDA"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{PROGRAM} {VERSION}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {L.__version__}, CUDA {cuda}, {gpu}"
    )


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
