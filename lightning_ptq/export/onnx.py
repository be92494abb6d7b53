"""A calibrated student as an ONNX model: QuantizeLinear and DequantizeLinear around float operations."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from lightning_ptq.convert import OPS, container, convert
from lightning_ptq.errors import PTQError
from lightning_ptq.export.rewrites import (
    clips_behind,
    forget_origins,
    global_pools,
    integer_biases,
    quantized_moves,
)
from lightning_ptq.files import write_whole
from lightning_ptq.graph.pack import pack_of
from lightning_ptq.graph.units import Chain
from lightning_ptq.layers import quantized_layers
from lightning_ptq.quantizers import act_quantizers

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# The first with 4-bit and 16-bit integers in QuantizeLinear and DequantizeLinear.
OPSET = 21
_MOST_BITS = {torch.int8: 8, torch.uint8: 8, torch.int16: 16, torch.uint16: 16}


def onnx_model(
    student: Chain,
    image_shape: Sequence[int],
    metadata: Mapping[str, Any],
    every_unit: bool = False,
    int32_biases: bool = False,
) -> ModelProto:
    """The ONNX model of a calibrated student: "images" (N, C, H, W), N as you like, in; "output" out, or several.

    Weights of 4 bits and less are int4 or uint4, others int8 or uint8. QuantizeLinear knows the range of its type only;
    where the grid is smaller than that, a Clip comes before it.

    Args:
        metadata: plain values, stored as JSON under "lightning_ptq".
        every_unit: one output for each unit, named after it.
        int32_biases: store biases as integers, with scales of their own, where they are multiples of what a kernel
            adds up; else as float32, which a runtime rounds to the same.

    Raises:
        PTQError: what `convert` raises; onnx or onnxscript is not installed; an operation that ONNX can't express.
    """
    require("onnx", "onnxscript")
    model = convert(student, every_unit)
    clip_small_grids(model)
    names = [*(student.names[:-1] if every_unit else ()), *output_names(student)]
    exported = _exported(model, torch.zeros(2, *image_shape), names)
    layers = [pair for unit in student.units for pair in quantized_layers(unit)]
    narrow_weights(exported, [name for name, layer in layers if layer.weight_quantizer.bits <= 4])
    clips_as_bounds(exported, small_grids(student))
    for rewrite in (
        clips_behind,
        global_pools,
        quantized_moves,
        *([integer_biases] if int32_biases else []),
        forget_origins,
    ):
        rewrite(exported)
    entry = exported.metadata_props.add()
    entry.key, entry.value = "lightning_ptq", json.dumps(dict(metadata))
    return exported


def output_names(student: Chain) -> tuple[str, ...]:
    """ "output", or what the model calls its outputs."""
    pack = pack_of(student)
    return ("output",) if pack is None else pack.names


def require(*packages: str) -> None:
    """Raise `PTQError` saying what to install if one of `packages` is missing."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise PTQError(f"export needs {', '.join(missing)}: pip install 'lightning-ptq[export]'.")


def clip_small_grids(model: fx.GraphModule) -> None:
    """Clamp what a quantize operation reads to its grid, where the integer type holds more than that."""
    for node in list(model.graph.nodes):
        if node.target is not OPS.quantize_per_tensor.default:
            continue
        x, scale, zero_point, qmin, qmax, dtype = node.args
        if qmax - qmin + 1 < 2 ** _MOST_BITS[dtype]:
            with model.graph.inserting_before(node):
                bounds = ((qmin - zero_point) * scale, (qmax - zero_point) * scale)
                clamped = model.graph.call_function(torch.clamp, (x, *bounds))
            node.args = (clamped, *node.args[1:])
    model.recompile()


def _exported(model: fx.GraphModule, images: Tensor, names: Sequence[str]) -> ModelProto:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter logs what it tries
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about versions to come, of what torch itself calls
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=list(names),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # the innermost names the operation
            reason = reason.__cause__
        raise PTQError(
            f"torch.onnx can't express the model: {' '.join(str(reason).split())[:400]}. Take what it names out of the "
            "model, or write it with operations that ONNX has."
        ) from error
    finally:
        logging.disable(level)
    assert program is not None
    proto: ModelProto = program.model_proto
    return proto


def narrow_weights(model: ModelProto, layers: Iterable[str]) -> None:
    """Store the weights of `layers`, and their zero points, in 4-bit integers, in place."""
    from onnx import TensorProto, numpy_helper
    from onnx.helper import make_tensor

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    read_by = {name: node for node in model.graph.node for name in node.input}
    for layer in layers:
        weight = tensors.get(f"{layer}.weight")
        node = None if weight is None else read_by.get(weight.name)
        if weight is None or node is None or node.op_type != "DequantizeLinear":
            continue
        kind = TensorProto.UINT4 if weight.data_type == TensorProto.UINT8 else TensorProto.INT4
        zeros = numpy_helper.to_array(tensors[node.input[2]])
        for name, values in ((weight.name, numpy_helper.to_array(weight)), (f"{layer}.zero_point_4bit", zeros)):
            stored = tensors[name] if name in tensors else model.graph.initializer.add()
            stored.CopyFrom(make_tensor(name, kind, values.shape, nibbles(values), raw=True))
        # A zero point of its own: layers of other types may share the old one.
        node.input[2] = f"{layer}.zero_point_4bit"
    read = {name for node in model.graph.node for name in node.input}
    for unread in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(unread)


def nibbles(values: NDArray[Any]) -> bytes:
    """4-bit integers, two in a byte, the first one in its lower half, as ONNX packs them."""
    flat = values.flatten().astype(np.uint8) & 0xF  # negative ones wrap to two's complement
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return bytes(flat[::2] | flat[1::2] << 4)


def small_grids(student: Chain) -> set[tuple[float, int]]:
    """(scale, zero point) of every activation quantizer whose grid is smaller than its integer type."""
    return {
        (float(q.scale), int(q.zero_point))
        for q in act_quantizers(student)
        if q.bits < _MOST_BITS[container(q.bits, q.symmetric)]
    }


def clips_as_bounds(model: ModelProto, grids: set[tuple[float, int]]) -> None:
    """Write the Clip before each QuantizeLinear with one of `grids` as Max and Min, in place.

    ONNX Runtime rounds the float bias of a layer to int32 multiples of input scale x weight scale where it finds but
    Relu and Clip between the layer and a QuantizeLinear. With few bits these multiples are coarse: it would be another
    network than the one that was simulated.
    """
    from onnx import numpy_helper
    from onnx.helper import make_node

    stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def grid(node: NodeProto) -> tuple[float, int]:
        scale, zero_point = (numpy_helper.to_array(stored[name]).item() for name in node.input[1:3])
        return scale, zero_point

    quantized = {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear" and grid(n) in grids}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Clip" and node.output[0] in quantized:
            x, low, high = node.input
            nodes.append(make_node("Max", [x, low], [f"{node.output[0]}_low"], name=f"{node.name}_low"))
            nodes.append(make_node("Min", [f"{node.output[0]}_low", high], node.output, name=f"{node.name}_high"))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def save_onnx(model: ModelProto, path: Path) -> None:
    """Write an ONNX model."""
    import onnx

    write_whole(path, lambda to: onnx.save(model, str(to)))


def load_onnx(path: Path, optimised: bool = True) -> Callable[[Tensor], Sequence[Tensor]]:
    """What runs an ONNX model in ONNX Runtime, on the CPU: images (N, C, H, W) -> outputs; or as it is written.

    Raises:
        PTQError: ONNX Runtime can't load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait busily would take the time of whatever runs next, the simulation or another session.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own kinds, which have no name in common
        raise PTQError(
            f"ONNX Runtime {onnxruntime.__version__} can't load {str(path)!r}, which is kept: "
            f"{' '.join(str(error).split())[:400]}. It knows uint8 best: act_symmetric=False."
        ) from error
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(y) for y in session.run(None, {name: images.cpu().numpy()})]
