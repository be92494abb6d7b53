"""A model around the one part of it that is quantized: a detector around its backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.errors import DEVICE_ERRORS, PTQError
from lightning_ptq.graph.pack import pack_of, unpacked
from lightning_ptq.graph.units import Chain
from lightning_ptq.losses import ContrastiveConfig
from lightning_ptq.methods import Method

# Images that pass through the model together, to see what its part reads: it may enlarge them.
CHUNK = 8


class _Reached(Exception):
    """Ends a pass of the model where its part is called; holds what the part reads."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.read = args


class _Opening(nn.Module):
    """Stands where the part was; calls `fill` in its place, at most once in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fill: Callable[[Tensor], Any] | None = None
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        read = (*args, *kwargs.values())
        if self.fill is None:
            raise _Reached(read)
        self.calls += 1
        if self.calls > 1 or len(read) != 1:
            raise PTQError(
                "the part is called more than once, or with more than one tensor; calibration sees one. Name a part "
                "that is called once, with one tensor."
            )
        return self.fill(read[0])


class Surroundings(nn.Module):
    """A copy of `model` without its part.

    Args:
        model: in eval mode; what it takes and returns is its own affair. It is not changed.
        part: qualified name of the submodule, which takes one tensor (N, C, H, W).

    Raises:
        PTQError: no such submodule.
    """

    def __init__(self, model: nn.Module, part: str) -> None:
        super().__init__()
        modules = dict(model.named_modules())
        if part not in modules or not part:
            children = ", ".join(repr(name) for name, _ in model.named_children())
            raise PTQError(f"part={part!r} names no module of {type(model).__name__}. It has {children}.")
        self.part, self.opening = part, _Opening()
        # The memo keeps deepcopy from copying the part: the opening takes its place.
        self.model = deepcopy(model, {id(modules[part]): self.opening}).requires_grad_(False)

    def inputs(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """What the part reads when the model is given `images`: (N, C, H, W), or a list of (C, H, W).

        Raises:
            PTQError: the part is not called, or with something else than one tensor that has a row for each image.
        """
        try:
            with torch.no_grad():
                self.model(images)
        except _Reached as reached:
            read = reached.read
        except DEVICE_ERRORS:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise PTQError(
                f"{type(self.model).__name__} fails before it calls its part {self.part!r}: {error}. Check the images' "
                "size and channels (data.resize, data.crop); what the model reads of its part itself can't be replaced."
            ) from error
        else:
            raise PTQError(f"{type(self.model).__name__} does not call its part {self.part!r}. Name another part.")
        if len(read) != 1 or not isinstance(read[0], Tensor) or len(read[0]) != len(images):
            raise PTQError(
                f"{type(self.model).__name__} calls its part {self.part!r} with something else than one tensor, a row "
                "for each image. Name another part."
            )
        return read[0]

    def all_inputs(self, images: Tensor) -> Tensor:
        """The same for many images (N, C, H, W)."""
        device = next((t.device for t in (*self.parameters(), *self.buffers())), images.device)
        return torch.cat([self.inputs(x.to(device)).to(images.device) for x in images.split(CHUNK)])

    def shape_of(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """(C, H, W) of what the part reads when images have `image_shape`."""
        return tuple(self.all_inputs(torch.zeros(1, *image_shape)).shape[1:])

    def forward(self, images: Any, chain: Chain) -> Any:
        """The model's output for `images`, with `chain` in place of the part."""
        self.opening.fill, self.opening.calls = lambda x: outputs_of(chain, x), 0
        try:
            return self.model(images)
        finally:
            self.opening.fill = None


def outputs_of(chain: Chain, x: Tensor) -> Any:
    """What the module that `chain` was made of returns for `x`: a tensor, a dict or a tuple."""
    pack = pack_of(chain)
    if pack is None:
        return chain(x)
    with unpacked(pack) as outputs:
        chain(x)
    return pack.structured(outputs)


def likely_part(model: nn.Module) -> str | None:
    """The part of a model that is no chain of layers from image to result: a detector's backbone; None elsewhere.

    torchvision's detectors resize images in their `transform`, give them to their `backbone`, and find boxes with a
    region proposal network or from anchors.
    """
    children = {name for name, _ in model.named_children()}
    detects = {"backbone", "transform"} <= children and ("rpn" in children or "anchor_generator" in children)
    return "backbone" if detects else None


def without_classes(method: Method, critic: ContrastiveConfig) -> ContrastiveConfig:
    """`critic` for a part, which gives features: negatives that may be alike are told by these, not by a class.

    Raises:
        PTQError: the method compares predictions.
    """
    if method.prediction:
        raise PTQError(
            f"prediction={method.prediction:g} compares class scores, and a part has none. Use 0, or another method."
        )
    return replace(critic, collisions="similarity") if critic.collisions == "argmax" else critic
