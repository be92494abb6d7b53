"""What the command line says of a wrong option or value: the value, the rule, and the nearest right name."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from importlib import import_module
from typing import Any

from lightning_ptq.help import COMMANDS, PROGRAM


def in_our_words(message: str, error: Exception | None, parser: argparse.ArgumentParser, path: str) -> str:
    """One line for what jsonargparse says in several; `path` is the config that is read, if one is."""
    known = (
        _missing(message, parser)
        or _no_settings(message, error, path)
        or _no_group(message, parser)
        or _wrong_value(message, parser)
    )
    return known or f"{_one_line(message)}{_suggestion(message, parser)}"


# What jsonargparse calls a type, and what that is for who types it.
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping"}
_KINDS |= {"Sequence": "a list", "list": "a list", "tuple": "a list", "NoneType": "null"}


# What jsonargparse shows of a class's options that it could not take.
_OF_CLASS = r"NestedArg\(|Namespace\(|class_path"


def _wrong_value(message: str, parser: argparse.ArgumentParser) -> str | None:
    """Which option has which value, and what it takes; None if the message is not of a value of another type."""
    keys = re.findall(r'Parser key "([\w.]+)":', message)
    # The innermost comes first. A class that is not there, or that could not be made of its options, is no value.
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if not keys or value is None or "Expected a path but" in message or re.search(_OF_CLASS, value[1]):
        return None
    types = re.findall(r"Expected (?:an? )?(.+?)(?:\. Got value: .*)?$", message[: value.end()], re.MULTILINE)
    kinds = [_kind(name) for name in dict.fromkeys(types)]
    if kinds == ["null"]:
        return None
    name = ".".join(key.removeprefix("init_args.") for key in keys)
    action = next((action for action in parser._actions if action.dest == name), None)
    text = f"{name}={value[1]} is not {' or '.join(kinds)}."
    if action is not None and isinstance(action.help, str):
        first = re.split(r"[.;]\s|\.$", " ".join(action.help.split()))[0]
        return f"{text} {first[:1].upper()}{first[1:]}."
    owner = re.search(r"class_path '([\w.]+)'", message)
    return text if owner is None else f"{text} {_lists(parser, keys[0], owner[1])}"


def _kind(name: str) -> str:
    """A type as jsonargparse writes it, in words."""
    if found := re.match(r"typing\.Literal\[(.*)\]", name):
        return f"one of {found[1]}"
    if found := re.match(r"tuple with (\d+) elements", name):
        return f"a list of {found[1]}"
    short = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", name)
    return _KINDS.get(short, short)


def _lists(parser: argparse.ArgumentParser, key: str, owner: str) -> str:
    """Where the options of a class are listed that `key` is given."""
    return f"{PROGRAM} {parser.prog.split()[-1]} --{key}.help {owner} lists what it takes."


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
    if isinstance(error, UnicodeDecodeError):
        return f"config={path!r} is not text in UTF-8 ({error.reason} at byte {error.start}). Save it as that."
    if mark is None:
        return None
    within = f" ({cause.context})" if cause.context else ""
    return f"config={path!r}, line {mark.line + 1}: {cause.problem}{within}. Mend the YAML there."


def _no_group(message: str, parser: argparse.ArgumentParser) -> str | None:
    """That a name has several settings, or is set by others, and which; None if the message is not of that."""
    if linked := re.search(r"argument _?\w+\((\w+)\) --> ([\w.]+):", message):
        return f"{linked[2]} follows from --{linked[1]}. Leave it out."
    found = re.search(r'Parser key "([\w.]+)":\s+Unable to load config "(.*?)"', message)
    if found is None:
        return None
    names = [name for action in parser._actions for name in action.option_strings if name.startswith(f"--{found[1]}.")]
    own = [name for name in names if not name.endswith(".help")]
    return (
        f"{found[1]}={found[2]} is neither a setting nor a YAML file that is there: {found[1]} has several settings, "
        f"like {own[0]}. {PROGRAM} {parser.prog.split()[-1]} --help {found[1]}. lists them."
    )


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
        if wrong[1] and f"--model.{wrong[1]}" in options:  # the same setting, of the other half
            found = " or ".join(filter(None, (f"--model.{wrong[1]}", found)))
        key = re.search(r'Parser key "([\w.]+)"', message)
        if found or not wrong[1] or not key:
            return f" Did you mean {found}?" if found else ""
        return f" {_lists(parser, key[1], path[1])}"
    if path and (lacks := re.search(r"required: ([\w, ]+)", message)) and (key := re.search(r'key "(\w+)"', message)):
        return " Give " + " and ".join(f"--{key[1]}.{name}" for name in lacks[1].split(", ")) + "."
    return ""


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that is most like `word`, as a whole or in its last part; None if none is like it.

    Of several that have the whole of it for a part, like the `bits` of weights and activations, the nearest three.
    """
    names = list(names)
    group, last = _parts(word)

    def likeness(name: str) -> float:
        whole, own = (SequenceMatcher(None, *pair).ratio() for pair in ((word, name), (last, _parts(name)[1])))
        within = 0.8 * (len(last) > 3 and (last in _parts(name)[1] or sorted(last) == sorted(_parts(name)[1])))
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
