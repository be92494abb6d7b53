"""An exported program whose layers run in oneDNN's int8 kernels, on the CPU.

Inductor, PyTorch's compiler, calls these kernels where a graph names them. That it put them in the place of dequantize,
layer and quantize by itself has moved to torchao. `convert` writes few kinds of graph: here that is done for them.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lightning_ptq.convert import OPS

aten, onednn = torch.ops.aten, torch.ops.onednn
_CONV2D, _LINEAR = aten.conv2d.default, aten.linear.default
# Of one and three dimensions, inductor or oneDNN can't do all that is needed.
_LAYERS = {_CONV2D, _LINEAR, aten.conv1d.default, aten.conv3d.default}
_LAYERS |= {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
_DEQUANTIZE = (OPS.dequantize_per_tensor.default, OPS.dequantize_per_channel.default)
_RELUS = (aten.relu.default, aten.relu_.default)
_RELU6S = (aten.relu6.default, aten.hardtanh.default, aten.hardtanh_.default)
# What moves numbers about, or takes the largest of them, gives integers where it reads integers.
_MOVES = {
    *(aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.select.int, aten.slice.Tensor),
    *(aten.contiguous.default, aten.dropout.default, aten.max_pool2d.default),
}


def why_not(compiled: bool) -> str | None:
    """Why this machine can't run a lowered program, or can't compile it; None if it can."""
    if not torch.backends.mkldnn.is_available() or not hasattr(onednn, "qconv_pointwise"):
        return "this build of PyTorch has no int8 kernels of oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "this CPU has no VNNI instructions, without which oneDNN's int8 kernels saturate"
    if compiled:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "inductor finds no C++ compiler (set CXX, or install g++)"
    return None


@torch.no_grad()
def lower(program: ExportedProgram) -> fx.GraphModule:
    """The program, each of its layers in an int8 kernel if there is one; the others are as they were.

    There is one for linear layers and convolutions of images whose weights are symmetric and which read a tensor
    quantized to unsigned integers, of eight bits or less. The ReLU behind it, and a quantizer of eight bits behind
    that, become part of the kernel.
    """
    model = program.module(check_guards=False)
    assert isinstance(model, fx.GraphModule)
    quantize_moved(model.graph)
    for node in list(model.graph.nodes):
        if node.target in (_CONV2D, _LINEAR):
            use_kernel(model, node)
    use_floats(model)
    model.graph.eliminate_dead_code()
    model.recompile()
    return model


def kernels(model: fx.GraphModule) -> tuple[int, int]:
    """How many layers of a lowered program are in int8 kernels, and how many there are."""
    targets = [node.target for node in model.graph.nodes]
    integer = sum(target in (onednn.qconv_pointwise.default, onednn.qlinear_pointwise.default) for target in targets)
    return integer, integer + sum(target in _LAYERS for target in targets)


def compiled(model: fx.GraphModule) -> Callable[[Tensor], Any]:
    """What inductor makes of a lowered program, at the first call and for each new shape of the images."""
    from torch._inductor import config

    run = torch.compile(model)

    def call(images: Tensor) -> Any:
        # Its int8 kernels take packed weights as constants, which only freezing makes them. Dynamo looks at the
        # global setting, so that torch.compile(options=...) would not do.
        with torch.no_grad(), config.patch(freezing=True):
            return run(images)

    return call


def quantize_moved(graph: fx.Graph) -> None:
    """Quantize anew, to the same integers, what was moved about after it was dequantized: layers read it from there."""
    for node in list(graph.nodes):
        read = node.args[0] if node.args else None
        if node.target in _MOVES and isinstance(read, fx.Node) and read.target == OPS.dequantize_per_tensor.default:
            readers, grid = list(node.users), read.args[1:]
            with graph.inserting_after(node):
                integers = graph.call_function(OPS.quantize_per_tensor.default, (node, *grid))
            with graph.inserting_after(integers):
                real = graph.call_function(OPS.dequantize_per_tensor.default, (integers, *grid))
            for reader in readers:
                reader.replace_input_with(node, real)


def use_kernel(model: fx.GraphModule, layer: fx.Node) -> None:
    """Put an int8 kernel in the place of a layer and of what it can compute with it, if there is one."""
    x, weight = layer.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    found = symmetric_weight(model, weight)
    if found is None or x.target != OPS.dequantize_per_tensor.default or x.args[5] != torch.uint8:
        return
    integers, scale = found
    x_integers, x_scale, x_zero = x.args[:3]
    covered, post, result = with_readers(layer)
    bias = layer.args[2] if len(layer.args) > 2 else None
    how: tuple[Any, ...] = ()
    if layer.target == _CONV2D:
        how, kernel = convolution_arguments(layer), onednn.qconv_pointwise.default
        packed = onednn.qconv_prepack(integers, scale, x_scale, x_zero, *how, None)
    else:
        kernel, packed = onednn.qlinear_pointwise.default, onednn.qlinear_prepack(integers, None)
    constants = {"packed": packed, "scale": scale, "zero_point": torch.zeros(len(scale), dtype=torch.int32)}
    with model.graph.inserting_before(covered[-1]):
        fetched = []
        for leaf, value in constants.items():
            model.register_buffer(f"{layer.name}_{leaf}", value)
            fetched.append(model.graph.get_attr(f"{layer.name}_{leaf}"))
        arguments = (x_integers, x_scale, x_zero, *fetched, bias, *how, *result, *post, "")
        replacement = model.graph.call_function(kernel, arguments)
    covered[-1].replace_all_uses_with(replacement)
    for node in reversed(covered):
        model.graph.erase_node(node)


def use_floats(model: fx.GraphModule) -> None:
    """Dequantize the weights that are left once and for all; inductor before 2.14 stumbles over some of them."""
    for node in list(model.graph.nodes):
        if node.target in _DEQUANTIZE and (found := weight_of(model, node)) is not None:
            model.register_buffer(f"{node.name}_float", node.target(*found, *node.args[3:]))
            with model.graph.inserting_before(node):
                node.replace_all_uses_with(model.graph.get_attr(f"{node.name}_float"))


def with_readers(layer: fx.Node) -> tuple[list[fx.Node], tuple[str, list[Any]], tuple[Any, ...]]:
    """The nodes that a kernel computes from `layer` on, and its arguments: the activation, and scale, zero and type."""
    covered, post = [layer], ("none", list[Any]())
    result: tuple[Any, ...] = (1.0, 0, torch.float32)
    if (reader := only_reader(layer)) is not None and reader.target in (*_RELUS, *_RELU6S):
        # relu6 has no arguments, and hardtanh its limits.
        limits = [float(limit) for limit in reader.args[1:]] or [0.0, 6.0]  # type: ignore[arg-type]
        post = ("relu", []) if reader.target in _RELUS else ("hardtanh", limits)
        covered.append(reader)
    if (reader := only_reader(covered[-1])) is not None and reader.target == OPS.quantize_per_tensor.default:
        scale, zero, *grid = reader.args[1:]
        if grid == [0, 255, torch.uint8]:  # a kernel knows the range of the type only
            covered.append(reader)
            result = (scale, zero, torch.uint8)
    return covered, post, result


def only_reader(node: fx.Node) -> fx.Node | None:
    """The node that alone reads this one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def convolution_arguments(layer: fx.Node) -> tuple[Any, ...]:
    """Stride, padding and dilation of a convolution, two numbers each, and groups: what is left out has its default."""
    given: list[Any] = list(layer.args[3:])
    *pairs, groups = given + [1, 0, 1, 1][len(given) :]
    return (*([pair] * 2 if isinstance(pair, int) else list(pair) * (2 // len(pair)) for pair in pairs), groups)


def symmetric_weight(model: fx.GraphModule, weight: fx.Node) -> tuple[Tensor, Tensor] | None:
    """A layer's int8 weight, (O, ...), and the scale of each of its outputs, (O,); None if zero is not at 0."""
    if weight.target not in _DEQUANTIZE or (found := weight_of(model, weight)) is None:
        return None
    integers, scale, zero = found
    along = weight.args[3] if weight.target == _DEQUANTIZE[1] else 0
    if integers.dtype != torch.int8 or torch.as_tensor(zero).any() or along != 0:
        return None
    return integers, torch.as_tensor(scale, dtype=torch.float32).expand(len(integers)).contiguous()


def weight_of(model: fx.GraphModule, node: fx.Node) -> list[Any] | None:
    """Integers, scale and zero point that a node dequantizes; None if it is an activation."""
    first, *others = node.args[:3]
    if not isinstance(first, fx.Node) or first.op != "get_attr":
        return None
    return [attrgetter(str(n.target))(model) if isinstance(n, fx.Node) else n for n in (first, *others)]
