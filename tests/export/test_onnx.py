"""Exported models run in ONNX Runtime and do what the simulation does; what does not is found out and named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightning_ptq as ptq
from lightning_ptq import PTQError, QuantConfig
from lightning_ptq.cli import main
from lightning_ptq.export.onnx import load_onnx, nibbles
from lightning_ptq.export.parity import Likeness, compare_outputs, in_double
from tests.helpers import tiny_data, tiny_images, tiny_module, tiny_net, trainer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def fitted(folder: Path, quant: QuantConfig, **changes: Any) -> ptq.PTQModule:
    module = tiny_module(quant, **({"steps_per_unit": 3} | changes))
    trainer(folder, logger=False).fit(module, datamodule=tiny_data())
    return module


def element_types(model: Any) -> dict[str, str]:
    """Type of every stored tensor."""
    return {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}


@pytest.mark.parametrize(
    ("weight_bits", "act_bits", "symmetric", "kind"),
    [
        (2, 2, False, "UINT4"),
        (4, 4, True, "INT4"),
        (3, 6, False, "UINT4"),
        (5, 8, False, "UINT8"),
        (8, 8, True, "INT8"),
    ],
)
def test_the_file_does_what_the_simulation_does(
    tmp_path: Path, weight_bits: int, act_bits: int, symmetric: bool, kind: str
) -> None:
    quant = QuantConfig(weight_bits, act_bits, weight_symmetric=symmetric)
    module = fitted(tmp_path, quant)
    path = tmp_path / "out" / "model.onnx"
    report = ptq.export_onnx(module, path)
    assert report.passed, report.text()
    assert report.agreement == 100.0
    assert report.sqnr_db > 40
    assert report.images == 40
    assert report.size == path.stat().st_size
    assert "as simulated" in report.text()
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]

    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    types = element_types(model)
    assert types["blocks.0.conv1.weight"] == kind
    assert types["stem.weight"] in ("INT8", "UINT8")  # an edge
    counts = [node.op_type for node in model.graph.node]
    assert counts.count("QuantizeLinear") == len({layer.reads for layer in module.chains.layers})
    assert counts.count("DequantizeLinear") == counts.count("QuantizeLinear") + len(module.chains.layers)
    told = {entry.key: entry.value for entry in model.metadata_props}
    described = json.loads(told["lightning_ptq"])
    assert described["weight_bits"] == weight_bits
    assert described["model"] == "TinyNet"
    assert len(described["teacher_sha256"]) == 64


@pytest.mark.parametrize("bits", [8, 4])
def test_with_hardware_placement_integer_kernels_do_the_work(tmp_path: Path, bits: int) -> None:
    import onnxruntime

    quant = QuantConfig(bits, 8, placement="hardware", weight_symmetric=True)
    module = fitted(tmp_path, quant)
    path, optimised = tmp_path / "model.onnx", tmp_path / "optimised.onnx"
    report = ptq.export_onnx(module, path)
    assert report.passed, report.text()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimised), 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(str(optimised)).graph.node]
    if bits == 8:
        assert ops.count("QLinearConv") == 5
        assert ops.count("QLinearAdd") == 2
        assert ops.count("QLinearGlobalAveragePool") == ops.count("QGemm") == 1
        assert ops.count("QuantizeLinear") == 1  # the images
        assert not {"Conv", "DequantizeLinear"}.intersection(ops)


def pooled_net() -> nn.Module:
    """Layers whose outputs are pooled and flattened before they are quantized."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(72, 6), nn.ReLU(), nn.Linear(6, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("bits", "net"), [(8, tiny_net), (3, tiny_net), (8, pooled_net)])
def test_biases_are_simulated_as_the_runtime_rounds_them(
    tmp_path: Path, bits: int, net: Callable[[], nn.Module]
) -> None:
    """It makes int32 multiples of those between two quantizers of 8 bits, without being asked."""
    import onnxruntime

    module = ptq.PTQModule(net(), QuantConfig(bits, 8), steps_per_unit=3, batch_size=8, seed=3)
    trainer(tmp_path, logger=False).fit(module, datamodule=tiny_data())
    path, optimised = tmp_path / "model.onnx", tmp_path / "optimised.onnx"
    ptq.export_onnx(module, path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimised), 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ours, theirs = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for model in (onnx.load(str(path)), onnx.load(str(optimised)))
    )
    layers = {node.name: node for node in onnx.load(str(path)).graph.node}
    rounded = 0
    graph = onnx.load(str(optimised)).graph
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        source = made_by.get(node.input[2]) if node.op_type in ("Conv", "Gemm") and len(node.input) == 3 else None
        if source is not None and source.op_type == "DequantizeLinear":
            integers, scale = (theirs[name] for name in source.input[:2])
            assert integers.dtype == np.int32
            bias = ours[layers[node.name].input[2]]
            np.testing.assert_allclose(integers * scale, bias, rtol=1e-5, atol=float(np.min(scale)) * 1e-2)
            rounded += 1
    assert rounded == sum(layer.gives is not None for layer in module.chains.layers) > 0


@pytest.mark.parametrize("net", [tiny_net, pooled_net])
def test_signed_activations_run_as_well(tmp_path: Path, net: Callable[[], nn.Module]) -> None:
    quant = QuantConfig(8, 8, placement="hardware", weight_symmetric=True, act_symmetric=True)
    module = ptq.PTQModule(net(), quant, "nearest", batch_size=8)
    trainer(tmp_path, logger=False).fit(module, datamodule=tiny_data())
    report = ptq.export_onnx(module, tmp_path / "model.onnx")
    assert report.passed, report.text()


def test_any_number_of_images_goes_in(tmp_path: Path) -> None:
    module = fitted(tmp_path, QuantConfig(4, 4))
    path = tmp_path / "model.onnx"
    ptq.export_onnx(module, path, tiny_images(4))
    for count in (1, 7):
        x = tiny_images(count, seed=9)
        with torch.no_grad():
            expected = module.eval()(x)
        torch.testing.assert_close(load_onnx(path)(x)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_file_that_differs_is_found_out_and_the_unit_named(tmp_path: Path, monkeypatch: Any) -> None:
    module = fitted(tmp_path, QuantConfig(8, 8))
    from lightning_ptq.export import onnx as exporter

    def broken(student: Any, every_unit: bool = False) -> Any:
        model = convert(student, every_unit)
        model.get_buffer("blocks.1.conv1.scale").mul_(3)
        return model

    convert = exporter.convert
    monkeypatch.setattr(exporter, "convert", broken)
    report = ptq.export_onnx(module, tmp_path / "model.onnx")
    assert not report.passed
    assert report.unit == "blocks.1"
    asked = "NOT as simulated, for which 40 dB and 99.9 % of classes are asked."
    assert f"{asked} The first unit that differs is 'blocks.1'." in report.text()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory: pytest.TempPathFactory) -> ptq.PTQModule:
    """One calibrated module for tests that only look at it."""
    return fitted(tmp_path_factory.mktemp("eight_bits"), QuantConfig(8, 8))


@pytest.fixture(scope="module")
def models() -> dict[bool, Any]:
    """What that module was exported to: as it is, and with the outputs of every unit."""
    return {}


@pytest.mark.parametrize(
    ("file", "double", "plain", "passed"),
    [
        ((99.0, 35.0), (100.0, 120.0), (100.0, 120.0), True),  # ties of faster kernels
        ((98.0, 35.0), (100.0, 120.0), (100.0, 120.0), False),  # that is more than ties
        ((99.0, 29.0), (99.0, 33.0), (99.0, 31.0), False),
        ((99.0, 35.0), (99.2, 36.0), (99.0, 34.0), True),  # where the simulation itself does not do better
        ((99.0, 35.0), (99.2, 36.0), (99.0, 32.0), False),
        ((99.0, 35.0), (100.0, 120.0), (100.0, 39.0), False),
    ],
)
def test_ties_are_told_from_errors(
    tmp_path: Path,
    monkeypatch: Any,
    eight_bits: ptq.PTQModule,
    models: dict[bool, Any],
    file: tuple[float, float],
    double: Any,
    plain: Any,
    passed: bool,
) -> None:
    import lightning_ptq.export as package

    def made_once(student: Any, shape: Any, metadata: Any, every_unit: bool, integers: bool) -> Any:
        if every_unit not in models:
            models[every_unit] = make(student, shape, metadata, every_unit, integers)
        return models[every_unit]

    found = [Likeness(round(10 * agreement), 1000, sqnr, 0.1) for agreement, sqnr in (file, double, plain)]
    make, measured = package.onnx_model, iter(found)
    monkeypatch.setattr(package, "onnx_model", made_once)
    monkeypatch.setattr(package, "compare_outputs", lambda *args: next(measured))
    report = ptq.export_onnx(eight_bits, tmp_path / "model.onnx", tiny_images(4))
    assert report.passed == passed
    assert f"{plain[1]:.1f} dB without the runtime's optimisations" in report.text()
    assert f"in double precision: {double[1]:.1f} dB" in report.text()
    assert ("as simulated, but for ties" in report.text()) == passed


def test_the_last_images_count_as_much_as_the_others(eight_bits: ptq.PTQModule) -> None:
    """65 come in chunks of 64 and 1."""
    images, student = tiny_images(65), eight_bits.student
    with torch.no_grad():
        right = torch.cat([student(x) for x in images.split(64)])
    given = iter([right[:64], -right[64:]])
    found = compare_outputs(student, lambda x: (next(given),), images)
    expected = 10 * math.log10(float(right.square().sum() / (2 * right[64:]).square().sum()))
    assert found.sqnr_db == pytest.approx(expected, abs=1e-3)


def test_one_image_of_a_thousand_may_differ_and_one_of_fewer() -> None:
    for count, least in ((1000, 999), (1024, 1023), (2000, 1998), (10_000, 9990), (20, 19)):
        assert Likeness(least, count, 40.0, 0.1).reaches(99.9, 40.0), count
        assert not Likeness(least - 1, count, 40.0, 0.1).reaches(99.9, 40.0), count
    assert Likeness(0, 0, 40.0, 0.1).reaches(99.9, 40.0)
    assert not Likeness(20, 20, 39.9, 0.1).reaches(99.9, 40.0)


def test_in_double_precision_the_simulation_is_itself(eight_bits: ptq.PTQModule) -> None:
    student, x = eight_bits.student, tiny_images(6)
    with torch.no_grad():
        torch.testing.assert_close(in_double(student)(x)[0], student(x), rtol=0.02, atol=0.02)
    assert student.find("fc").weight.dtype == torch.float32


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fresh = tiny_module()
    with pytest.raises(PTQError, match="have no ranges yet"):
        ptq.export_onnx(fresh, path, tiny_images(4))
    partly = tiny_module(steps_per_unit=3)
    trainer(tmp_path / "partly", logger=False, max_epochs=2).fit(partly, datamodule=tiny_data())
    with pytest.raises(PTQError, match=r"calibration is not finished: 'blocks.1', 'fc', 'whole-network' are left"):
        ptq.export_onnx(partly, path, tiny_images(4))
    done = fitted(tmp_path / "done", QuantConfig(4, 4))
    done._trainer = None
    with pytest.raises(PTQError, match="parity needs images"):
        ptq.export_onnx(done, path)
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(PTQError, match=r"model.onnx' exists and is kept"):
        ptq.export_onnx(done, path, tiny_images(4))
    assert path.read_text() == "precious"
    assert ptq.export_onnx(done, path, tiny_images(4), overwrite=True).passed


def test_a_file_that_the_runtime_cannot_load_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(PTQError, match=r"ONNX Runtime .+ can't load '.*model.onnx', which is kept: .*Protobuf"):
        load_onnx(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), r"float32, and got \(4, 3, 8, 8\) in uint8"),
        (torch.zeros(3, 8, 8), r"float32, and got \(3, 8, 8\) in float32"),
        (torch.zeros(0, 3, 8, 8), r"float32, and got \(0, 3, 8, 8\)"),
        (torch.zeros(4, 1, 8, 8), r"images of shape \(1, 8, 8\) do not fit the model: unit 'stem'"),
    ],
)
def test_images_that_do_not_fit_are_refused(eight_bits: ptq.PTQModule, tmp_path: Path, images: Any, said: str) -> None:
    for export in (ptq.export_onnx, ptq.export_pt2):
        with pytest.raises(PTQError, match=said):
            export(eight_bits, tmp_path / "model", images)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(PTQError, match=r"export needs onnxscript: pip install 'lightning-ptq\[export\]'"):
        ptq.export_onnx(tiny_module(), tmp_path / "model.onnx")


def test_an_operation_that_onnx_has_not_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.special.bessel_j0(self.conv(x)).mean((2, 3)))

    module = ptq.PTQModule(Odd().eval(), QuantConfig(8, 8), "nearest", batch_size=8, seed=0)
    trainer(tmp_path, logger=False).fit(module, datamodule=tiny_data())
    with pytest.raises(PTQError, match="bessel_j0"):
        ptq.export_onnx(module, tmp_path / "model.onnx")


def test_export_from_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(Path(QUICKSTART).parents[1])
    run = f"--trainer.default_root_dir={tmp_path}"
    few = ["--model.steps_per_unit=3", "--data.calibration_samples=64"]
    main(["fit", "--config", QUICKSTART, run, *few, "--trainer.logger=false"])
    config, checkpoint = (next(tmp_path.rglob(name)) for name in ("config.yaml", "last.ckpt"))
    output = tmp_path / "digits.onnx"
    args = ["export", "--config", str(config), f"--ckpt_path={checkpoint}", f"--output={output}"]
    capsys.readouterr()
    main(args)
    assert "64 images: 100.00 % of classes agree" in capsys.readouterr().out
    assert output.exists()
    main([*args[:-1], f"--output={tmp_path / 'digits.pt2'}"])
    assert "digits.pt2: " in (said := capsys.readouterr().out)
    assert "100.00 % of classes agree" in said
    assert "no int8 kernels: " in said  # these weights are not symmetric
    with pytest.raises(PTQError, match="exists and is kept"):
        main(args)
    monkeypatch.setattr("lightning_ptq.export.parity.Likeness.reaches", lambda *args: False)
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--overwrite=true"])
    assert stopped.value.code == 1
    assert "NOT as simulated" in capsys.readouterr().out
    packed = tmp_path / "digits.ptq"
    main(["export", "--config", str(config), f"--ckpt_path={checkpoint}", f"--output={packed}"])
    assert f"digits.ptq: {packed.stat().st_size:,} bytes (weights " in capsys.readouterr().out
    with pytest.raises(PTQError, match=r"Let it end in .onnx, .pt2 or .ptq"):
        main([*args[:-1], "--output=digits.pt"])
    with pytest.raises(PTQError, match="export needs a finished fit"):
        main(["export", "--config", str(config)])


@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
@pytest.mark.parametrize("count", [1, 2, 7, 24])
def test_weights_of_four_bits_take_half_a_byte(kind: str, count: int) -> None:
    low = -8 if kind == "INT4" else 0
    values = np.random.default_rng(count).integers(low, low + 16, count).astype(np.int8 if low else np.uint8)
    packed = nibbles(values)
    assert len(packed) == (count + 1) // 2
    tensor = onnx.helper.make_tensor("w", getattr(onnx.TensorProto, kind), values.shape, packed, raw=True)
    assert onnx.numpy_helper.to_array(tensor).astype(np.int8).tolist() == values.tolist()
    assert len(tensor.SerializeToString()) < count / 2 + 20
