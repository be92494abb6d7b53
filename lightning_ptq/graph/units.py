"""Units of a network: how they are built from nodes, what they are called, and the chain that they form."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_ptq.errors import PTQError
from lightning_ptq.graph.channels import channel_dim, written_dim
from lightning_ptq.graph.norms import ChannelGroup
from lightning_ptq.graph.taps import Tap
from lightning_ptq.graph.trace import attribute_of, op_name


class Chain(nn.Module):
    """A network as a sequence of units, tensor in, tensor out.

    Attributes:
        units: the units, graph modules whose submodules keep the qualified names of the original model.
        names: one unique, readable name for each unit.
        any_layout: whether no unit minds how its input is laid out in memory.
        image_shape: the only (C, H, W) of images that it takes; None if it takes any.
        norms, pairs: layer norms, and layers, whose channels can be brought closer together.
        is_part: the output is read by a model around it.

    Shape: input of unit `start` -> output of unit `stop - 1`.
    """

    def __init__(
        self,
        units: Sequence[fx.GraphModule],
        names: Sequence[str],
        any_layout: bool = False,
        image_shape: tuple[int, ...] | None = None,
        norms: tuple[ChannelGroup, ...] = (),
        pairs: tuple[ChannelGroup, ...] = (),
        is_part: bool = False,
    ) -> None:
        super().__init__()
        self.is_part = is_part
        self.any_layout, self.image_shape = any_layout, image_shape
        self.norms, self.pairs = norms, pairs
        self.units = nn.ModuleList(units)
        self.names = tuple(names)
        self._channel_dims: dict[tuple[int, int], int] = {}

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run `units[start:stop]`."""
        if start == 0:
            self.check_images(x)
        for unit in self.units[start:stop]:
            x = unit(x)
        return x

    def __len__(self) -> int:
        return len(self.units)

    def find(self, name: str) -> nn.Module:
        """The module that the original network calls `name`."""
        found: nn.Module = next(m for unit in self.units for known, m in unit.named_modules() if known == name)
        return found

    def check_images(self, images: Tensor) -> None:
        """Raise `PTQError` for images (N, C, H, W) of another shape than the network was captured for."""
        shape = tuple(images.shape[1:])
        if self.image_shape is not None and shape != self.image_shape:
            raise PTQError(
                f"images have shape {shape}, but the network was captured by torch.export for {self.image_shape}. "
                f"Give images (N, C, H, W) of that shape (data.resize, data.crop), or image_shape={shape}."
            )

    def channel_dim(self, unit: int, shape: Sequence[int]) -> int:
        """Which dimension of a unit's output, of `shape` (B, ...), is that of channels: 1, or the last one (-1)."""
        key = unit, len(shape)
        if key not in self._channel_dims:  # steps ask again and again
            graph = self.units[unit]
            assert isinstance(graph, fx.GraphModule)
            self._channel_dims[key] = channel_dim(graph, len(shape))
        return self._channel_dims[key]

    def laid_out(self, images: Tensor, device: torch.device) -> Tensor:
        """`images` (N, C, H, W) in the layout in which this network is fastest on `device`: channels last."""
        if self.any_layout and images.dim() == 4 and device.type in ("cpu", "cuda"):
            return images.contiguous(memory_format=torch.channels_last)
        return images


def unit_names(layers: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """One readable, unique name for each unit from its layers' names: the largest modules that it holds."""
    if len(layers) == 1:
        return ("net",)
    names: list[str] = []
    everything = [name for unit in layers for name in unit]
    for unit in layers:
        parts = list(dict.fromkeys(largest_module(name, unit, everything) for name in unit))
        name = "+".join(parts) if len(parts) < 4 else f"{parts[0]}..{parts[-1]}"
        while name in names:
            name += "_"
        names.append(name)
    return tuple(names)


def largest_module(layer: str, unit: Sequence[str], everything: Sequence[str]) -> str:
    """Name of the largest module around `layer` whose layers all belong to `unit`."""
    parts = layer.split(".")
    for depth in range(1, len(parts)):
        module = ".".join(parts[:depth])
        if all(name in unit for name in everything if name.startswith(module + ".")):
            return module
    return layer


def build_unit(
    root: nn.Module,
    nodes: Sequence[fx.Node],
    source: fx.Node,
    result: fx.Node,
    replace: Mapping[str, nn.Module],
    skip: Collection[fx.Node],
    taps: Sequence[fx.Node] = (),
) -> fx.GraphModule:
    """One unit: `nodes`, reading `source` and returning `result`, as a module from tensor to tensor.

    Args:
        root: holds the modules and parameters that the nodes name; they are shared, not copied.
        replace: modules to call instead, by qualified name.
        skip: nodes to leave out; their readers read their input.
        taps: nodes whose readers read a `Tap`.
    """
    graph, attributes = fx.Graph(), dict[str, Any]()
    copies = {source: graph.placeholder("x")}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies and node.meta.get("batch_size"):  # of what this unit reads
            size = graph.call_method("size", (copies[source], 0)) if op_name(node) == "sym_size" else None
            copies[node] = graph.node_copy(node, copy_of) if size is None else size
        if node not in copies:  # constants, at their first reader in this unit
            assert node.op == "get_attr", node
            copies[node] = graph.node_copy(node)
            attributes[str(node.target)] = attribute_of(root, str(node.target))
        return copies[node]

    for node in nodes:
        if node in skip:
            copies[node] = copy_of(node.all_input_nodes[0])
        else:
            copies[node] = graph.node_copy(node, copy_of)
            if node.op == "call_module":
                name = str(node.target)
                attributes[name] = replace[name] if name in replace else root.get_submodule(name)
        if node in taps:
            name = f"tap_{node.name}"
            attributes[name] = Tap(written_dim(root, node))
            copies[node] = graph.call_module(name, (copies[node],))
    graph.output(copy_of(result))
    return fx.GraphModule(attributes, graph, class_name="Unit")
