"""How much a network computes and keeps, and how much of it is quantized, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_ptq.graph.hardware import origin
from lightning_ptq.graph.units import Chain
from lightning_ptq.layers import is_quantized, quantized_layers
from lightning_ptq.quantizers import ActQuantizer

# Some networks take a batch of one image for none.
_IMAGES = 2


@dataclass(frozen=True)
class Counts:
    """Of one image.

    Attributes:
        multiply_adds: of every quantized layer, by its name.
        elements: of every quantized activation, by its quantizer's name.
    """

    multiply_adds: dict[str, int]
    elements: dict[str, int]


class _Counter(fx.Interpreter):
    """Runs a unit and counts the multiply-adds of each node, and the elements of each activation."""

    def __init__(self, unit: fx.GraphModule) -> None:
        super().__init__(unit)
        self.quantized = self.total = 0
        self.layers: dict[str, int] = {}
        self.elements: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        count = counter.get_total_flops() // 2
        self.total += count
        if self.is_quantized(n):
            self.quantized += count
        if n.op == "call_module" and is_quantized(self.module.get_submodule(str(n.target))):
            self.layers[str(n.target)] = count  # 0 for what torch's flop counter does not know
        if self._is_quantizer(n):
            self.elements[str(n.target)] = result.numel()
        return result

    def is_quantized(self, node: fx.Node) -> bool:
        """Whether a node computes with a quantized weight, or with two quantized activations."""
        if node.op == "call_module":
            return is_quantized(self.module.get_submodule(str(node.target)))
        unit = self.module
        assert isinstance(unit, fx.GraphModule)
        return all(self._is_quantizer(origin(unit, source)) for source in node.all_input_nodes)

    def _is_quantizer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.module.get_submodule(str(node.target)), ActQuantizer)


def multiply_adds(student: Chain, image_shape: tuple[int, ...]) -> tuple[int, int]:
    """(quantized, all) multiply-adds of one image of `image_shape` (C, H, W), in convolutions and matrix products.

    Inside modules that are kept whole, what torch's flop counter knows is counted as well.
    """
    counters = _count(student, image_shape)
    return sum(c.quantized for c in counters) // _IMAGES, sum(c.total for c in counters) // _IMAGES


def counts_of(student: Chain, image_shape: tuple[int, ...]) -> Counts:
    """What each quantized layer and activation takes for one image of `image_shape` (C, H, W)."""
    counters = _count(student, image_shape)
    return Counts(
        {name: n // _IMAGES for counter in counters for name, n in counter.layers.items()},
        {name: n // _IMAGES for counter in counters for name, n in counter.elements.items()},
    )


def _count(student: Chain, image_shape: tuple[int, ...]) -> list[_Counter]:
    weight = quantized_layers(student)[0][1].weight
    counters = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x = torch.empty(_IMAGES, *image_shape, dtype=weight.dtype, device=weight.device)
        for unit in student.units:
            assert isinstance(unit, fx.GraphModule)
            counters.append(_Counter(unit))
            x = counters[-1].run(x)
    return counters
