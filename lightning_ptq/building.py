"""A user's network from what a config says of it: a name, an import path, a weights file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.errors import PTQError

_OURS = "lightning_ptq.models"


def build_network(model: nn.Module | str, weights: str | None) -> nn.Module:
    """The trained network, in eval mode.

    Args:
        model: a torchvision model's name ("resnet18"), the import path of a function that returns a model
            ("my_package.net.build"), or the model.
        weights: a file with the model's state dict, or the name of torchvision weights ("DEFAULT"). None leaves the
            model as it was built. A torchvision model has as many classes as the file.

    Raises:
        PTQError: an unknown model, or weights that do not fit it.
    """
    network = model if isinstance(model, nn.Module) else build_model(model, weights)
    if weights is not None and (Path(weights).exists() or not is_torchvision(model)):
        state = without_prefix(network, read_state(weights), weights)
        if isinstance(model, str) and is_torchvision(model) and (classes := other_classes(network, state)):
            network = build_model(model, num_classes=classes)
        load_state(network, state, weights)
    # Networks are built in training mode; from here on nobody could have meant that.
    return network.eval()


def build_model(name: str, weights: str | None = None, **options: int) -> nn.Module:
    """The torchvision model `name`, with torchvision's `weights` if they are no file, or what `name` imports to.

    `options` are those of torchvision's model.
    """
    if is_torchvision(name):
        import torchvision

        named = weights if weights is not None and not Path(weights).exists() else None
        if named is not None and name in torchvision.models.list_models():
            check_named(named, name)
        try:
            # Detectors and segmentation networks would download their backbone's weights.
            takes = signature(torchvision.models.get_model_builder(name)).parameters
            own = {"weights_backbone": None} if named is None and "weights_backbone" in takes else {}
            return torchvision.models.get_model(name, weights=named, **own, **options)  # type: ignore[no-any-return]
        except ValueError as error:
            raise PTQError(
                f"model={name!r} with weights={weights!r}: {error}.{_suggestion(name)} Name a model and weights of "
                "torchvision, a weights file that exists, or the import path of a function that returns a model."
            ) from None
        except OSError as error:
            raise PTQError(
                f"weights={weights!r} of {name!r} can't be downloaded: {error}. Give a weights file that exists."
            ) from error
    module, _, attribute = name.rpartition(".")
    try:
        build = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise PTQError(f"model={name!r} can't be imported: {error}. Give the path of a function or class.") from None
    try:
        network = build()
    except TypeError as error:
        raise PTQError(
            f"model={name!r} can't be called without arguments: {error}. Give class_path and init_args, or the path "
            "of a function that needs none."
        ) from error
    if not isinstance(network, nn.Module):
        raise PTQError(f"model={name!r} returned {type(network).__name__}, not a torch.nn.Module.")
    return network


def check_named(weights: str, model: str) -> None:
    """Raise `PTQError` unless torchvision has such weights of `model`; what looks like a file was to be one."""
    import torchvision

    ours = torchvision.models.get_model_weights(model)
    known = [each.name for each in ours]
    group, _, name = weights.rpartition(".")
    if name in ("DEFAULT", *known) and group in ("", ours.__name__):
        return
    if os.sep in weights or (Path(weights).suffix and not group.endswith("_Weights")):
        check_file(weights)
    raise PTQError(
        f"weights={weights!r} is no file, and of {model!r} torchvision has {', '.join(known) or 'none'}. Name one of "
        "these, or a weights file that exists."
    )


def _suggestion(name: str) -> str:
    """The model that may be meant by a name that torchvision does not know."""
    from torchvision.models import list_models

    names = {model: model for model in list_models()} | {
        model: f"{_OURS}.{model}" for model in ("resnet20", "digits_net")
    }
    return "".join(f" Did you mean {names[near]}?" for near in get_close_matches(name, names, n=1))


def load_weights(model: nn.Module, path: str) -> None:
    """Load a state dict, bare or below "state_dict" or "model", strictly and without running code from the file."""
    load_state(model, without_prefix(model, read_state(path), path), path)


def check_file(path: str) -> None:
    """Raise `PTQError` where there is no such weights file."""
    if not Path(path).is_file():
        raise PTQError(
            f"weights={path!r} is no file, seen from {str(Path.cwd())!r}. Give a state dict saved with torch.save, or, "
            "with a run's config.yaml, call from the folder where that run was started."
        )


def read_state(path: str) -> Any:
    """What a weights file holds: a state dict if it is one, read without running code from the file."""
    check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise PTQError(f"weights={path!r} can't be read: {reason}. Save a plain state dict with torch.save.") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return state


def without_prefix(model: nn.Module, state: Any, path: str) -> Any:
    """The part of `state`, which `path` holds, that is the model's, where a wrapper put its name before every key.

    That is "module." in what DDP saves, and an attribute's name in a LightningModule's checkpoint.

    Raises:
        PTQError: several parts are the model's, such as an average of weights beside the weights, and differ.
    """
    if not isinstance(state, dict):
        return state
    own = model.state_dict().keys()
    first = next(iter(own), "")
    found = {"": {key: state[key] for key in own}} if own <= state.keys() else {}
    for prefix in (str(key).removesuffix(first) for key in state if str(key).endswith(f".{first}")):
        part = {str(key).removeprefix(prefix): value for key, value in state.items() if str(key).startswith(prefix)}
        if part.keys() == own:
            found[prefix] = part
    if not found.keys() - {""}:
        return state  # bare, or of another model: loading says what is too much
    one, *others = found.values()
    if not all(_are_equal(one, other) for other in others):
        raise PTQError(
            f"weights={path!r} holds weights of {type(model).__name__} below {' and '.join(map(repr, found))}, and "
            "they differ. Save the state dict of the one that is to be quantized."
        )
    return one


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = ((one[key], other[key]) for key in one)
    return all(isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y) for x, y in pairs)


def load_state(model: nn.Module, state: Any, path: str) -> None:
    """Load a state dict from the file `path` strictly."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        what = _differences(model.state_dict(), state) or _first_line(error)
        raise PTQError(
            f"weights={path!r} do not fit {type(model).__name__}: {what}. Give the file that this model was saved to."
        ) from None


def _differences(own: Mapping[str, Tensor], state: Any) -> str:
    """How many keys a state dict lacks, has too many or has in another shape, and the first of them."""
    if not isinstance(state, dict):
        return f"it holds a {type(state).__name__}, not a state dict"
    kinds = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            key for key in own if key in state and own[key].shape != getattr(state[key], "shape", None)
        ],
    }
    return ", ".join(f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds.items() if keys)


def _first(keys: Sequence[Any], count: int = 3) -> str:
    return ", ".join([*map(str, keys[:count]), *["..."] * (len(keys) > count)])


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines()[1:2]), str(error))


def other_classes(model: nn.Module, state: Any) -> int | None:
    """How many classes `state` has where it fits `model` but for their number; None if that is not all."""
    own = model.state_dict()
    if not isinstance(state, dict) or own.keys() != state.keys():
        return None
    pairs = [(own[key].shape, state[key].shape) for key in own if own[key].shape != state[key].shape]
    found = {(mine[:1], other[:1]) for mine, other in pairs}
    if len(found) != 1 or any(mine[1:] != other[1:] for mine, other in pairs):
        return None
    return int(pairs[0][1][0])


def is_torchvision(model: nn.Module | str) -> bool:
    """Whether `model` is the name of one of torchvision's."""
    return isinstance(model, str) and "." not in model
