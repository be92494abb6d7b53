"""From a model to a graph, by the first of three ways that reaches all of its weights.

fx        symbolic trace: images of any size
export    torch.export: what it read of an image's size is fixed
islands   fx again, with the modules that it cannot follow kept whole, in floating point
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from lightning_ptq.errors import PTQError
from lightning_ptq.graph.aliases import overwritten_alias
from lightning_ptq.graph.cuts import Liveness
from lightning_ptq.graph.export import exported
from lightning_ptq.graph.trace import TraceError, node_kinds, trace
from lightning_ptq.layers import is_quantizable

_TERMINAL = (
    "on the terminal it is that of the data (data.resize, data.crop; ImageFolderData reads 3 channels, a datamodule of "
    "your own may give others)"
)
# Modules kept whole one after another before we give up.
_MOST_ISLANDS = 50


@dataclass(frozen=True)
class Captured:
    """A model's graph.

    Attributes:
        gm: tensor in, tensor out.
        image_shape: the only shape (C, H, W) of images that the graph is right for; None if it takes any.
        islands: modules kept whole because nothing could follow them.
    """

    gm: fx.GraphModule
    image_shape: tuple[int, ...] | None = None
    islands: tuple[str, ...] = ()


def capture(
    model: nn.Module,
    leaf_modules: Sequence[str] = (),
    image_shape: Sequence[int] | None = None,
    is_part: bool = False,
) -> Captured:
    """The graph of a copy of `model`.

    Args:
        model: in eval mode, takes one tensor and returns one tensor.
        leaf_modules: patterns of qualified module names that stay in floating point.
        image_shape: (C, H, W) of the images, for models that fx cannot follow; None guesses it from the model.
        is_part: of another model, which reads all of its outputs: they are returned packed, not the main one only.

    Raises:
        PTQError: what `trace` raises; for code that nothing can follow, what each of the ways said.
    """
    traced: fx.GraphModule | None = None
    failure: TraceError | None = None
    alias: fx.Node | None = None
    try:
        traced = trace(model, leaf_modules, is_part)
    except TraceError as error:
        failure = error
    else:
        alias = overwritten_alias(traced)
        if alias is None and not hides_weights(traced, leaf_modules) and not carries_sizes(traced):
            return Captured(traced)
    shape = check_shape(image_shape) if image_shape is not None else likely_image_shape(model)
    try:
        run_on_zeros(model, shape)
        return Captured(exported(model, shape, is_part), shape)
    except Exception as error:
        refused = error  # dealt with behind the block: what is raised in it would show all that torch has to say
    refusal = f"{type(refused).__name__}: {textwrap.shorten(str(refused), 300, placeholder=' ...')}"
    if isinstance(refused, WrongShape) and (image_shape is not None or traced is None):
        given = "was given" if image_shape is not None else "is a guess"
        raise PTQError(
            f"{type(model).__name__} fails on images of shape {shape}, which {given}: {refused}. "
            f"torch.fx can't capture all of it, and torch.export has to know: give image_shape=(C, H, W); "
            f"{_TERMINAL}."
        )
    if alias is not None:
        raise PTQError(
            f"{type(model).__name__}: {alias.name!r} overwrites a tensor that is read under another name later, as "
            "a view of it is. torch.export could take that apart, but with images of shape "
            f"{shape} it says: {refusal}. Write that line without an in-place operation, or give "
            f"image_shape=(C, H, W); {_TERMINAL}."
        )
    if traced is not None:
        warnings.warn(
            f"{type(model).__name__}: some layers stay in floating point or in large units, since torch.export "
            f"with images of shape {shape} says: {refusal}. If your images have another shape, give "
            f"image_shape=(C, H, W); {_TERMINAL}. `plan` lists what stays.",
            stacklevel=2,
        )
        return Captured(traced)
    assert failure is not None
    return with_islands(model, leaf_modules, failure, shape, refusal, is_part)


class WrongShape(Exception):
    """The model itself fails on images of the shape that it was to be captured for."""


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` as a tuple; raises `PTQError` if it is no (C, H, W)."""
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise PTQError(f"image_shape={tuple(shape)} is no (channels, height, width). Give that of one image.")
    return tuple(shape)


def run_on_zeros(model: nn.Module, shape: Sequence[int]) -> None:
    """Raise `WrongShape` if the model can't take images of `shape`."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    try:
        with torch.no_grad():
            model(like.new_zeros(2, *shape))
    except Exception as error:
        raise WrongShape(textwrap.shorten(str(error), 200, placeholder=" ...")) from error


def with_islands(
    model: nn.Module,
    leaf_modules: Sequence[str],
    failure: TraceError,
    shape: Sequence[int],
    refusal: str,
    is_part: bool,
) -> Captured:
    """Trace with the innermost module that fx cannot follow kept whole, as often as it takes."""
    islands: list[str] = []
    lines: list[str] = []  # of the user's code
    for _ in range(_MOST_ISLANDS):
        if not failure.path:
            break
        islands.append(failure.path[-1])
        lines += [line.strip() for line in str(failure).splitlines()[1:2]]
        try:
            gm = trace(model, [*leaf_modules, *islands], is_part)
        except TraceError as error:
            failure = error
        else:
            stay = f" and {len(islands) - 1} more stay" if len(islands) > 1 else " stays"
            warnings.warn(
                f"{type(model).__name__}: {islands[0]!r}{stay} in floating point, since neither torch.fx nor "
                f"torch.export can follow {lines[0]!r}. `plan` lists what stays.",
                stacklevel=2,
            )
            return Captured(gm, islands=tuple(islands))
    raise PTQError(
        f"{failure}\ntorch.export with images of shape {tuple(shape)} cannot follow it either: {refusal}. "
        f"If your images have another shape, give image_shape=(C, H, W); {_TERMINAL}."
    )


def hides_weights(gm: fx.GraphModule, leaf_modules: Sequence[str]) -> bool:
    """Whether a function or module that fx did not look into computes with weights, unless asked to stay whole."""
    kinds = node_kinds(gm)
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module, name = gm.get_submodule(str(node.target)), str(node.target)
            asked = any(fnmatchcase(name, pattern) for pattern in leaf_modules)
            whole = kinds[node] == "opaque" and next(module.parameters(), None) is not None
            inside = any(is_quantizable(m) or isinstance(m, nn.MultiheadAttention) for m in module.modules())
            if not asked and (whole or (inside and not is_quantizable(module))):
                return True
        elif kinds[node] == "opaque" and any(source.op == "get_attr" for source in node.all_input_nodes):
            return True
    return False


def carries_sizes(gm: fx.GraphModule) -> bool:
    """Whether somewhere nothing but sizes of the image, read further on, forbids to cut between two layers."""
    live = Liveness(gm)
    called = {i: gm.get_submodule(str(node.target)) for i, node in enumerate(live.nodes) if node.op == "call_module"}
    layers = [i for i, module in called.items() if isinstance(module, nn.Linear | _ConvNd)]
    between = [range(layer, following) for layer, following in pairwise(layers)]
    return any(live.points_but_for_scalars & set(gap) and not live.points & set(gap) for gap in between)


def likely_image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that a model says it is for; 224 pixels if it says nothing."""
    config = getattr(model, "default_cfg", None)
    told = config.get("input_size") if isinstance(config, dict) else None
    layers = (module for module in model.modules() if isinstance(module, _ConvNd))
    channels = next((layer.in_channels for layer in layers), 3)
    # Squares of pixels may have been stacked as channels before the first convolution.
    if told and channels in {int(told[0]) * side**2 for side in range(2, 9)}:
        channels = int(told[0])
    for owner in (model, getattr(model, "patch_embed", None)):
        for name in ("image_size", "img_size"):
            size = getattr(owner, name, None)
            if isinstance(size, int):
                return channels, size, size
            if isinstance(size, tuple | list) and len(size) == 2:
                return channels, int(size[0]), int(size[1])
    return (channels, int(told[-2]), int(told[-1])) if told else (channels, 224, 224)
