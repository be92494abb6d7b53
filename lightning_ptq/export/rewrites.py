"""Rewrites of an ONNX model that keep what it computes and let a runtime compute it with integers.

A runtime replaces DequantizeLinear, operation, QuantizeLinear by an integer kernel where it finds just these; anything
else among them keeps the operation in floating point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# What gives a tensor of the scale that it reads.
_MOVES = ("Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_LAYERS = ("Conv", "Gemm")


def integer_biases(model: ModelProto) -> None:
    """Store each bias that is a multiple of input scale x weight scale as int32, in place.

    An integer kernel adds it up with the products. Placement "hardware" makes every bias such a multiple.
    """
    from onnx.helper import make_node

    values, producers = constants(model), producers_of(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        bias = values.get(node.input[2]) if node.op_type in _LAYERS and len(node.input) == 3 else None
        step = None if bias is None else accumulator_step(node, values, producers)  # (O,), or ()
        if bias is not None and step is not None and are_multiples(bias, step):
            name = f"{node.output[0]}_bias"
            integers = store(model, f"{name}_integers", (bias / step).round().astype(np.int32))
            inputs = [integers, store(model, f"{name}_scale", step)]
            nodes.append(make_node("DequantizeLinear", inputs, [name], name=f"{node.name}_bias", axis=0))
            node.input[2] = name
        nodes.append(node)
    replace_nodes(model, nodes)


def accumulator_step(node: NodeProto, values: dict[str, Any], producers: dict[str, NodeProto]) -> Any:
    """Input scale x weight scale of a layer; None if either of them is not quantized."""
    x, weight = producers.get(node.input[0]), producers.get(node.input[1])
    while x is not None and x.op_type in _MOVES:
        x = producers.get(x.input[0])
    read = [source for source in (x, weight) if source is not None and source.op_type == "DequantizeLinear"]
    return values[read[0].input[1]] * values[read[1].input[1]] if len(read) == 2 else None


def are_multiples(bias: Any, step: Any) -> bool:
    """Whether a bias is an int32 multiple of `step`, but for a hundredth of it or for what float32 resolves."""
    multiples = (bias / step).round()
    close = abs(multiples * step - bias) <= step / 100 + abs(bias) * 1e-6
    return bool((close & (abs(multiples) < 2**31)).all())


def clips_behind(model: ModelProto) -> None:
    """Move each Clip before a QuantizeLinear behind it, and drop it where the integers' type ends there, in place.

    Rounding keeps the order of numbers, so both ways give the same integers.
    """
    from onnx.helper import make_node

    values, producers = constants(model), producers_of(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        clip = producers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if clip is None or clip.op_type != "Clip" or len(clip.input) < 3 or not all(clip.input[1:]):
            continue
        scale, zero = (values[name] for name in node.input[1:3])
        ends = np.iinfo(zero.dtype)
        low, high = (np.clip((values[name] / scale).round() + zero, ends.min, ends.max) for name in clip.input[1:])
        node.input[0] = clip.input[0]
        if (low, high) != (ends.min, ends.max):
            name = node.output[0]
            node.output[0] = f"{name}_unclipped"
            bounds = (("low", low), ("high", high))
            stored = [store(model, f"{name}_{end}", bound.astype(zero.dtype)) for end, bound in bounds]
            nodes.append(make_node("Clip", [node.output[0], *stored], [name], name=f"{node.name}_clip"))
    replace_nodes(model, nodes)


def global_pools(model: ModelProto) -> None:
    """Write each mean over the height and width of images as GlobalAveragePool, in place: means have no kernel."""
    from onnx.helper import get_attribute_value, make_node

    values = constants(model)
    known = (*model.graph.input, *model.graph.value_info)
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in known}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        axes = values.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) == 2 else None
        if axes is None or ranks.get(node.input[0]) != 4 or {int(axis) % 4 for axis in axes.flatten()} != {2, 3}:
            nodes.append(node)
            continue
        keeps = {a.name: get_attribute_value(a) for a in node.attribute}.get("keepdims", 1)
        pooled = node.output[0] if keeps else f"{node.output[0]}_pooled"  # (N, C, 1, 1)
        nodes.append(make_node("GlobalAveragePool", node.input[:1], [pooled], name=node.name))
        if not keeps:
            axes = store(model, f"{node.output[0]}_axes", np.array([2, 3]))
            nodes.append(make_node("Squeeze", [pooled, axes], node.output, name=f"{node.name}_squeeze"))
    replace_nodes(model, nodes)


def quantized_moves(model: ModelProto) -> None:
    """Quantize what a pool or a view makes of int8 activations to the grid it is on already, in place.

    ONNX Runtime does the same, but gives int8 the zero point of uint8 (1.32), and fails to load what it made.
    """
    from onnx.helper import make_node

    values = constants(model)
    grids: dict[str, list[str]] = {}  # an activation on an int8 grid -> scale and zero point of that
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type == "DequantizeLinear" and node.input[0] not in values:
            grid = list(node.input[1:])
            if values[grid[1]].dtype == np.int8:
                grids[node.output[0]] = grid
        elif node.op_type in _MOVES and node.input[0] in grids:
            name, grid = node.output[0], grids[node.input[0]]
            node.output[0], integers = f"{name}_moved", f"{name}_integers"
            nodes.append(make_node("QuantizeLinear", [node.output[0], *grid], [integers], name=f"{node.name}_quantize"))
            nodes.append(make_node("DequantizeLinear", [integers, *grid], [name], name=f"{node.name}_dequantize"))
            grids[name] = grid
    replace_nodes(model, nodes)


def forget_origins(model: ModelProto) -> None:
    """Drop what the exporter says about where each node came from, and shapes, in place: a third of a small file."""
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]


def constants(model: ModelProto) -> dict[str, Any]:
    """Every stored tensor as an array."""
    from onnx.numpy_helper import to_array

    return {tensor.name: to_array(tensor) for tensor in model.graph.initializer}


def producers_of(model: ModelProto) -> dict[str, NodeProto]:
    """What computes each tensor."""
    return {name: node for node in model.graph.node for name in node.output}


def store(model: ModelProto, name: str, value: Any) -> str:
    """Add a tensor to those that are stored; its name."""
    from onnx.numpy_helper import from_array

    model.graph.initializer.append(from_array(np.asarray(value), name))
    return name


def replace_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Give a model these nodes, but for what nothing reads; stored tensors that nothing reads go too."""
    read = {name for node in nodes for name in node.input} | {output.name for output in model.graph.output}
    kept = [node for node in nodes if read.intersection(node.output)]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    for unread in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(unread)
