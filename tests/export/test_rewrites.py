"""What is rewritten for integer kernels computes what it did before, and leaves nothing in floating point."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_ptq as ptq
from lightning_ptq import PTQModule, QuantConfig
from lightning_ptq.layers import quantized_layers
from tests.helpers import tiny_data, tiny_images, tiny_module, trainer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
np = pytest.importorskip("numpy")

from lightning_ptq.export.rewrites import clips_behind, global_pools  # noqa: E402 (after the skips)

HARDWARE = QuantConfig(8, 8, placement="hardware", weight_symmetric=True)


def fitted(net: nn.Module, quant: QuantConfig, folder: Path) -> PTQModule:
    module = PTQModule(net.eval(), quant, "nearest", batch_size=8, seed=0)
    trainer(folder, logger=False).fit(module, datamodule=tiny_data())
    return module


def model_of(nodes: list[Any], stored: dict[str, Any]) -> Any:
    """A model from "images" (N, 4, 5, 5) to "output"."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(op, inputs, outputs, name=outputs[0], **more) for op, inputs, outputs, more in nodes],
        "graph",
        [helper.make_tensor_value_info("images", kind, ["N", 4, 5, 5])],
        [helper.make_tensor_value_info("output", kind, None)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def run(model: Any, images: Tensor) -> Tensor:
    """What ONNX Runtime gives, without optimisations."""
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def ops(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


# The grid ends below 6, at 6, within half a step of it, above it; it begins below 0; the integers have a sign.
@pytest.mark.parametrize(
    ("scale", "zero", "kept"),
    [
        (0.02, np.uint8(0), False),
        (6 / 255, np.uint8(0), False),
        (6.01 / 255, np.uint8(0), False),
        (0.0255, np.uint8(0), True),
        (0.02, np.uint8(3), True),
        (0.05, np.int8(-128), True),
        (0.02, np.int8(-128), False),
    ],
)
def test_a_clip_of_integers_gives_what_a_clip_before_quantization_does(scale: float, zero: Any, kept: bool) -> None:
    nodes = [
        ("Clip", ["images", "low", "high"], ["clipped"], {}),
        ("QuantizeLinear", ["clipped", "scale", "zero"], ["integers"], {}),
        ("DequantizeLinear", ["integers", "scale", "zero"], ["output"], {}),
    ]
    model = model_of(nodes, {"low": np.float32(0), "high": np.float32(6), "scale": np.float32(scale), "zero": zero})
    images = 8 * torch.randn(64, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = run(model, images)
    clips_behind(model)
    assert ops(model) == ["QuantizeLinear", *["Clip"] * kept, "DequantizeLinear"]
    torch.testing.assert_close(run(model, images), expected, rtol=0, atol=0)
    assert len(model.graph.initializer) == 2 + 2 * kept


@pytest.mark.parametrize("keeps", [0, 1])
@pytest.mark.parametrize(("axes", "pools"), [([2, 3], True), ([-1, -2], True), ([3], False), ([1, 2], False)])
def test_a_mean_over_height_and_width_is_a_pool(axes: list[int], pools: bool, keeps: int) -> None:
    model = model_of(
        [("ReduceMean", ["images", "axes"], ["mean"], {"keepdims": keeps}), ("Relu", ["mean"], ["output"], {})],
        {"axes": np.array(axes)},
    )
    images = tiny_images(6)[:, :1, :5, :5].repeat(1, 4, 1, 1) * torch.arange(1.0, 5.0).view(4, 1, 1)
    global_pools(model)
    assert ("GlobalAveragePool" in ops(model)) == pools
    torch.testing.assert_close(run(model, images), images.mean(axes, keepdim=bool(keeps)).relu())


def test_biases_are_stored_as_the_integers_that_kernels_add_up(tmp_path: Path) -> None:
    module = tiny_module(HARDWARE, method="nearest")
    trainer(tmp_path, logger=False).fit(module, datamodule=tiny_data())
    ptq.export_onnx(module, tmp_path / "model.onnx")
    model = onnx.load(str(tmp_path / "model.onnx"))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made_by = {node.output[0]: node for node in model.graph.node}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight, bias = (made_by[name] for name in node.input[1:])
            assert bias.op_type == "DequantizeLinear"
            integers, scale = (stored[name] for name in bias.input)
            assert integers.dtype == np.int32
            assert scale.dtype == np.float32
            found[weight.input[0].removesuffix(".weight")] = torch.from_numpy(integers * scale).float()
    simulated = {name: layer for unit in module.student.units for name, layer in quantized_layers(unit)}
    assert found.keys() == simulated.keys()
    for name, layer in simulated.items():
        torch.testing.assert_close(found[name], layer.quantized()[1].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("placement", ["paper", "hardware"])
@pytest.mark.parametrize("left", [0.0, 1e-9])
def test_a_bias_beside_weights_of_nothing_fits_the_accumulator(tmp_path: Path, placement: Any, left: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))

    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.a.weight[2] *= left
        net.a.bias[2] = 0.7
    quant = QuantConfig(8, 8, placement=placement, weight_symmetric=True)
    report = ptq.export_onnx(fitted(net, quant, tmp_path), tmp_path / "model.onnx")
    assert report.passed, report.text()


def test_a_file_of_8_bits_takes_little_more_than_a_quarter(tmp_path: Path) -> None:
    widths = [3, 96, 96, 96]
    layers = [[nn.Conv2d(i, o, 3, padding=1), nn.ReLU()] for i, o in pairwise(widths)]
    net = nn.Sequential(*(layer for pair in layers for layer in pair), nn.Flatten(), nn.Linear(96 * 64, 5))
    report = ptq.export_onnx(fitted(net, HARDWARE, tmp_path), tmp_path / "model.onnx")
    floats = sum(4 * parameter.numel() for parameter in net.parameters())
    assert report.size <= 0.27 * floats
