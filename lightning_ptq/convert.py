"""The integer model: integer weights, and activations that pass through quantize and dequantize operations.

Everything else is what it was. The operations are PyTorch's own (`quantized_decomposed`), which `torch.export`,
the ONNX exporter and PyTorch's int8 lowering know.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

# Registers the operations. `torch.ao` is moving to torchao: nothing else of this package imports it.
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from lightning_ptq.errors import PTQError
from lightning_ptq.functional import swap_channels
from lightning_ptq.graph.pack import Pack
from lightning_ptq.graph.taps import Tap
from lightning_ptq.graph.trace import attribute_of
from lightning_ptq.graph.units import Chain
from lightning_ptq.layers import TRANSPOSED, ConvTranspose, is_quantized
from lightning_ptq.quantizers import ActQuantizer, LogQuantizer, act_quantizers, weight_quantizers
from lightning_ptq.weights import WeightQuantizer

OPS = torch.ops.quantized_decomposed
_LARGEST_BIAS = 2**30  # half of what an accumulator holds
_CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


@torch.no_grad()
def convert(student: Chain, every_unit: bool = False) -> fx.GraphModule:
    """The integer model of a calibrated student, on the CPU; it shares nothing with it.

    Weights are int8 or uint8 whatever their bits, within their own range; biases stay float32. Activations have the
    scales that were learned. A quantize operation multiplies by 1 / scale where the student divides by the scale: what
    lies within float32's resolution of the middle between two integers may go to the other one.

    Args:
        every_unit: return the output of each unit, the last of which is the network's.

    Raises:
        PTQError: a unit has quantizers without ranges, or something that is for simulation only.
    """
    check_convertible(student)
    graph, attributes = fx.Graph(), dict[str, Any]()
    x: Any = graph.placeholder("images")
    outputs = []
    for unit in student.units:
        assert isinstance(unit, fx.GraphModule)
        x = add_unit(graph, attributes, unit, x)
        outputs.append(x)
    graph.output(tuple(outputs) if every_unit else x)
    return fx.GraphModule(attributes, graph, class_name="IntegerModel").eval().requires_grad_(False)


def check_convertible(student: Chain) -> None:
    """Raise `PTQError` naming the units that hold something which an integer model can't."""
    quantizers = [*act_quantizers(student), *weight_quantizers(student)]
    bare = [
        name
        for name, unit in zip(student.names, student.units, strict=True)
        if not all(q.enabled for q in quantizers if any(q is m for m in unit.modules()))
    ]
    if bare:
        raise PTQError(f"units {', '.join(map(repr, bare))} have no ranges yet. Run fit first, or load its checkpoint.")
    if any(isinstance(q, LogQuantizer) for q in quantizers):
        raise PTQError("quant.softmax='log2' is simulation only: no runtime has that grid. Use 'uniform' to export.")


def add_unit(graph: fx.Graph, attributes: dict[str, Any], unit: fx.GraphModule, source: fx.Node) -> Any:
    """Copy a unit that reads `source` to `graph`, quantizers and quantized layers as operations; its result."""
    copies: dict[fx.Node, Any] = {}
    for node in unit.graph.nodes:
        if node.op == "placeholder":
            copies[node] = source
        elif node.op == "output":
            return fx.map_arg(node.args[0], copies.__getitem__)
        elif node.op == "call_module":
            module, read = unit.get_submodule(str(node.target)), [copies[n] for n in node.all_input_nodes]
            if isinstance(module, ActQuantizer):
                copies[node] = add_activation(graph, module, read[0])
            elif is_quantized(module):
                copies[node] = add_layer(graph, attributes, str(node.target), module, read[0])
            elif isinstance(module, Tap):
                copies[node] = read[0]
            elif isinstance(module, Pack):
                copies[node] = module.structured(read)
            else:
                attributes[str(node.target)] = deepcopy(module).cpu()
                copies[node] = graph.node_copy(node, copies.__getitem__)
        else:
            if node.op == "get_attr":
                value = attribute_of(unit, str(node.target))
                attributes[str(node.target)] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
            copies[node] = graph.node_copy(node, copies.__getitem__)
    raise AssertionError("a graph has an output node")


def container(bits: int, symmetric: bool) -> torch.dtype:
    """The integer type that holds a grid of so many bits."""
    if bits <= 8:
        return torch.int8 if symmetric else torch.uint8
    return torch.int16 if symmetric else torch.uint16


def add_activation(graph: fx.Graph, q: ActQuantizer, x: fx.Node) -> fx.Node:
    """Nodes that quantize `x` and dequantize it."""
    grid = (float(q.scale), int(q.zero_point), q.qmin, q.qmax, container(q.bits, q.symmetric))
    integers = graph.call_function(OPS.quantize_per_tensor.default, (x, *grid))
    return graph.call_function(OPS.dequantize_per_tensor.default, (integers, *grid))


def scale_read(node: fx.Node) -> float:
    """Scale of the quantizer that gives `node`, or what it is made from; infinite if there is none."""
    while node.target is not OPS.dequantize_per_tensor.default:
        if len(node.all_input_nodes) != 1:
            return float("inf")
        (node,) = node.all_input_nodes
    return float(node.args[1])  # type: ignore[arg-type]


def add_layer(graph: fx.Graph, attributes: dict[str, Any], name: str, layer: nn.Module, x: fx.Node) -> fx.Node:
    """Nodes that compute what a quantized layer does, from its integer weight.

    Kernels add biases up as int32 multiples of input scale x weight scale. Where that would overflow, for a channel
    whose weights are next to nothing, these have a coarser scale.
    """
    q, weight = layer.weight_quantizer, layer.weight
    assert isinstance(q, WeightQuantizer)
    assert isinstance(weight, Tensor)

    def fetch(leaf: str, value: Tensor) -> fx.Node:
        attributes[f"{name}.{leaf}"] = value.detach().cpu().clone()
        return graph.get_attr(f"{name}.{leaf}")

    dtype = container(q.bits, q.symmetric)
    values, scale, zero = q.integers(weight), q.effective_scale, q.zero_point
    bias = q.correct(layer._parameters["bias"])
    if q.per_channel and bias is not None:
        coarser = (bias.abs().view_as(scale) / (scale * scale_read(x) * _LARGEST_BIAS)).clamp(min=1.0)
        values, scale = ((values - zero) / coarser).round() + zero, scale * coarser
    # Stored as the operation reads it, but where there are groups: then no dimension is that of the output channels.
    axis = 1 if isinstance(layer, ConvTranspose) and layer.groups == 1 else 0
    integers = fetch("weight", values.transpose(0, axis).contiguous().to(dtype))
    grid = (q.qmin, q.qmax, dtype)
    if q.per_channel:
        scales, zeros = fetch("scale", scale.flatten()), fetch("zero_point", zero.flatten().long())
        real = graph.call_function(OPS.dequantize_per_channel.default, (integers, scales, zeros, axis, *grid))
    else:
        real = graph.call_function(OPS.dequantize_per_tensor.default, (integers, float(scale), int(zero), *grid))
    offset = None if bias is None else fetch("bias", bias)
    if not isinstance(layer, _ConvNd):
        return graph.call_function(torch.nn.functional.linear, (x, real, offset))
    if isinstance(layer, ConvTranspose):
        depthwise = layer.in_channels == layer.out_channels == layer.groups  # the same in both layouts
        real = real if axis == 1 or depthwise else graph.call_function(swap_channels, (real, layer.groups))
        places: Any = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return graph.call_function(TRANSPOSED[len(layer.kernel_size)], (x, real, offset, *places))
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        around = layer._reversed_padding_repeated_twice
        x = graph.call_function(torch.nn.functional.pad, (x, around), {"mode": layer.padding_mode})
        padding = (0,) * len(layer.kernel_size)
    function = _CONVOLUTIONS[len(layer.kernel_size)]
    return graph.call_function(function, (x, real, offset, layer.stride, padding, layer.dilation, layer.groups))
