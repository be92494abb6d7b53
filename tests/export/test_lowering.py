"""Lowered programs do what the simulation does, in oneDNN's int8 kernels: counted where inductor writes its code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.export import Dim, ExportedProgram

import lightning_ptq as ptq
from lightning_ptq import PTQError, QuantConfig
from lightning_ptq.convert import convert
from lightning_ptq.export import compare_lowered, lowering, pt2
from lightning_ptq.graph import Chain
from tests.helpers import tiny_data, tiny_images, tiny_module, trainer
from tests.test_convert import calibrated

needs_kernels = pytest.mark.skipif(lowering.why_not(False) is not None, reason=str(lowering.why_not(False)))
needs_compiler = pytest.mark.skipif(lowering.why_not(True) is not None, reason=str(lowering.why_not(True)))
# Inductor before 2.14 imports what newer releases deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
HARDWARE = QuantConfig(8, 8, placement="hardware", weight_symmetric=True)


class Net(nn.Module):
    """Two convolutions, one of them grouped and strided, ReLU6 and ReLU, a pool and a flatten, an addition, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(8, 8, (3, 1), stride=(2, 1), padding=(1, 0), dilation=1, groups=4)
        self.pool, self.head = nn.MaxPool2d(3, 2, 1), nn.Linear(8 * 2 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(nn.functional.relu6(4 * self.a(x)))
        return self.head((torch.relu(self.b(x)) + x[:, :, ::2]).flatten(1))


def student(quant: QuantConfig, net: type[nn.Module] = Net) -> Chain:
    torch.manual_seed(0)
    return calibrated(net(), quant, tiny_images(32))


def program(of: Chain) -> ExportedProgram:
    return torch.export.export(convert(of), (tiny_images(4),), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)


def kernels_in(code: str) -> tuple[int, int]:
    """Convolutions and linear layers that generated code calls in int8; there has to be none in floating point."""
    in_floats = ("extern_kernels.convolution", "_convolution_pointwise", "_linear_pointwise", "addmm", ".mm")
    assert not any(word in code for word in in_floats)
    return code.count(" = torch.ops.onednn.qconv_pointwise"), code.count(" = torch.ops.onednn.qlinear_pointwise")


def targets(model: Any) -> list[str]:
    return [str(node.target) for node in model.graph.nodes if node.op == "call_function"]


@needs_compiler
def test_compiled_it_runs_in_int8_kernels_and_does_what_the_simulation_does() -> None:
    of, x = student(HARDWARE), tiny_images(8, seed=9)
    model = lowering.lower(program(of))
    actual, code = run_and_get_code(lowering.compiled(model), x)
    assert kernels_in("\n".join(code)) == (2, 1)
    with torch.no_grad():
        torch.testing.assert_close(actual, of(x), rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    "quant",
    [
        HARDWARE,
        QuantConfig(8, 8, weight_symmetric=True),
        QuantConfig(8, 8, weight_symmetric=True, weight_per="tensor"),
        QuantConfig(4, 4, weight_symmetric=True, placement="hardware"),
        QuantConfig(2, 3, weight_symmetric=True),
    ],
)
@torch.no_grad()
def test_every_layer_has_a_kernel_whatever_the_bits(quant: QuantConfig) -> None:
    of, x = student(quant), tiny_images(32, seed=9)
    model = lowering.lower(program(of))
    assert lowering.kernels(model) == (3, 3)
    assert not any("conv2d.default" in name or "linear.default" in name for name in targets(model))
    expected, actual = of(x), model(x)
    # But for what lies in the middle between two integers.
    assert float(((actual - expected).abs() > 1e-4 * expected.abs().max()).float().mean()) < 0.05


@needs_kernels
def test_activations_and_quantizers_become_part_of_the_kernels() -> None:
    model = lowering.lower(program(student(HARDWARE)))
    calls = [node for node in model.graph.nodes if "qconv_pointwise" in str(node.target)]
    assert [(call.args[13], call.args[14]) for call in calls] == [(torch.uint8, "hardtanh"), (torch.uint8, "relu")]
    assert calls[0].args[15] == [0.0, 6.0]
    assert not any("relu" in name or "hardtanh" in name for name in targets(model))
    # A range of less than 8 bits is no type's: then the quantizer stays.
    narrow = lowering.lower(program(student(QuantConfig(4, 4, weight_symmetric=True, placement="hardware"))))
    call = next(node for node in narrow.graph.nodes if "qconv_pointwise" in str(node.target))
    assert (call.args[13], call.args[14]) == (torch.float32, "hardtanh")


class Odd(nn.Module):
    """Of one dimension, of padding by name, and reading what nothing quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding="same")
        self.b, self.fc = nn.Conv1d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).flatten(2)).mean(2))


@needs_kernels
@pytest.mark.parametrize(
    ("quant", "net", "found"),
    [
        (QuantConfig(8, 8), Net, (0, 3)),
        (QuantConfig(8, 8, weight_symmetric=True, act_symmetric=True), Net, (0, 3)),
        (HARDWARE, Odd, (1, 3)),
    ],
)
@torch.no_grad()
def test_what_has_no_kernel_stays_as_it_is(quant: QuantConfig, net: type[nn.Module], found: tuple[int, int]) -> None:
    of, x = student(quant, net), tiny_images(8, seed=9)
    model = lowering.lower(program(of))
    assert lowering.kernels(model) == found
    torch.testing.assert_close(model(x), of(x), rtol=1e-4, atol=1e-4)


def fitted(folder: Path, quant: QuantConfig) -> ptq.PTQModule:
    module = tiny_module(quant, steps_per_unit=3)
    trainer(folder, logger=False).fit(module, datamodule=tiny_data())
    return module


@needs_compiler
def test_a_file_is_lowered_and_compared_by_the_same_gate(tmp_path: Path, monkeypatch: Any) -> None:
    module, path = fitted(tmp_path, HARDWARE), tmp_path / "model.pt2"
    assert ptq.export_pt2(module, path).passed
    report = compare_lowered(module, path)
    assert report.passed, report.text()
    assert report.kernels == (6, 6)
    assert f"{path} in int8 kernels: 6 of 6 layers; 40 images: 100.00 % of classes agree" in report.text()
    x = tiny_images(5, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(ptq.lower_pt2(path, compile=False)(x), module.eval()(x), rtol=1e-4, atol=1e-4)

    def broken(model: Any) -> Any:
        model.get_buffer("conv2d_3_scale").mul_(3)
        return compiled(model)

    compiled = lowering.compiled
    monkeypatch.setattr("lightning_ptq.export.compiled", broken)
    wrong = compare_lowered(module, path)
    assert not wrong.passed
    asked = "NOT as simulated, for which 40 dB and 99.9 % of classes are asked."
    assert f"{asked} The first unit that differs is 'blocks.1'." in wrong.text()
    assert [p.name for p in tmp_path.glob("*.pt2")] == ["model.pt2"]


def test_what_can_not_be_lowered_is_refused_with_the_reason(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(PTQError, match=r"is no file. Give what export_pt2 wrote"):
        ptq.lower_pt2(tmp_path / "none.pt2")
    path = tmp_path / "model.pt2"
    pt2.save_pt2(student(QuantConfig(8, 8)), (3, 8, 8), path)
    with monkeypatch.context() as patch:
        patch.setattr(pt2, "why_not", lambda compile: None)
        with pytest.raises(PTQError, match="none of the 3 layers has symmetric weights"):
            ptq.lower_pt2(path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        with pytest.raises(PTQError, match="this build of PyTorch has no int8 kernels of oneDNN"):
            ptq.lower_pt2(path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        with pytest.raises(PTQError, match="no VNNI instructions"):
            ptq.lower_pt2(path)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    no_compiler = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with no_compiler, pytest.raises(PTQError, match=r"no C\+\+ compiler"):
        ptq.lower_pt2(path)
