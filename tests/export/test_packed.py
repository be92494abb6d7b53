"""Packed checkpoints are as small as their bits promise and bring back the same network; damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_ptq as ptq
from lightning_ptq import PTQError, QuantConfig
from lightning_ptq.export.packed import digest, fill, layers_of, pack_bits, packed_size, packed_tensors, unpack_bits
from lightning_ptq.graph import build_chain
from lightning_ptq.models import resnet20
from lightning_ptq.ranges import weight_qparams
from tests.helpers import TinyNet, tiny_data, tiny_images, tiny_module, trainer
from tests.strategies import MAGNITUDES


def fitted(folder: Path, quant: QuantConfig, **changes: Any) -> ptq.PTQModule:
    module = tiny_module(quant, **({"steps_per_unit": 3} | changes))
    trainer(folder, logger=False).fit(module, datamodule=tiny_data())
    return module.eval()


@given(st.integers(2, 8), st.lists(st.integers(0, 255), max_size=50))
@settings(max_examples=100, deadline=None)
def test_packing_is_a_plain_stream_of_bits(bits: int, numbers: list[int]) -> None:
    values = [number % 2**bits for number in numbers]
    packed = pack_bits(torch.tensor(values, dtype=torch.uint8), bits)
    whole = sum(value << (i * bits) for i, value in enumerate(values))
    assert bytes(packed.tolist()) == whole.to_bytes(packed_size(len(values), bits), "little")
    assert unpack_bits(packed, bits, len(values)).tolist() == values


@pytest.mark.parametrize("method", ["qdrop", "flexround", "nearest"])
@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(2, 2),
        QuantConfig(4, 4, weight_symmetric=True, act_symmetric=True),
        QuantConfig(3, 5, weight_per="tensor", edges="same"),
        QuantConfig(8, 16),
        QuantConfig(4, 4, average_bits=3.0),
    ],
)
@torch.no_grad()
def test_what_is_loaded_is_bit_equal(tmp_path: Path, quant: QuantConfig, method: Any) -> None:
    module = fitted(tmp_path, quant, method=method)
    path = tmp_path / "model.ptq"
    sizes = ptq.save_packed(module, path)
    assert sum(sizes.values()) == path.stat().st_size
    other = TinyNet().eval()  # made by the same code; its weights do not matter
    before = {name: value.clone() for name, value in other.state_dict().items()}
    student = ptq.load_packed(path, other)
    x = tiny_images(20, seed=7)
    assert torch.equal(student(x), module(x))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["channel", "tensor"]),
    st.sampled_from(["nearest", "adaround", "flexround"]),
    st.lists(MAGNITUDES, min_size=5, max_size=5),
    st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None, derandomize=True)
@torch.no_grad()
def test_weights_of_any_size_travel_to_the_last_bit(
    bits: int, symmetric: bool, per: Any, rounding: str, sizes: list[float], seed: int
) -> None:
    """Every channel of another magnitude; integers, scales and zero points against those of the layers themselves."""
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).eval()
    config = QuantConfig(bits, 4, weight_per=per, weight_symmetric=symmetric, edges="same")
    here, there = (build_chain(net, config, "layer", rounding=rounding).student for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(here):
        q, shape = layer.weight_quantizer, layer.weight.shape
        factors = torch.tensor(sizes[: shape[0]]).view(-1, *[1] * (len(shape) - 1))
        layer.weight = nn.Parameter(torch.randn(shape, generator=generator) * factors, requires_grad=False)
        q.set_range(layer.weight, *weight_qparams(layer.weight, "mse", bits, symmetric, per == "channel"))
        for parameter in (*q.roundings, q.log_gain):
            parameter += torch.randn(parameter.shape, generator=generator)
    tensors = packed_tensors(here)
    fill(there, tensors)
    for a, b in zip(layers_of(here), layers_of(there), strict=True):
        p, q = a.weight_quantizer, b.weight_quantizer
        assert torch.equal(p.integers(a.weight), q.integers(b.weight))
        assert torch.equal(p.effective_scale, q.effective_scale)
        assert torch.equal(p.zero_point, q.zero_point)
        assert torch.equal(p(a.weight), q(b.weight))
    again = packed_tensors(there)
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


class Norms(nn.Module):
    """A layer norm whose channels are equalised, a place table, a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.fc = nn.Conv2d(3, 6, 2, 2), nn.LayerNorm(6, bias=False), nn.Linear(6, 6, bias=False)
        self.place, self.head = nn.Parameter(torch.randn(1, 16, 6)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2).transpose(1, 2) + self.place
        return self.head((x + self.fc(self.norm(x))).mean(1))


@torch.no_grad()
def test_what_stays_float_travels_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Norms().eval()
    nn.init.uniform_(net.norm.weight, 0.5, 4)
    module = ptq.PTQModule(net, QuantConfig(4, 4), steps_per_unit=3, batch_size=8, seed=0)
    with torch.enable_grad():
        trainer(tmp_path, logger=False).fit(module, datamodule=tiny_data())
    ptq.save_packed(module, tmp_path / "model.ptq")
    student = ptq.load_packed(tmp_path / "model.ptq", Norms())
    x = tiny_images(20, seed=7)
    assert torch.equal(student(x), module.eval()(x))


def test_a_four_bit_resnet20_is_a_seventh_of_the_float_one(tmp_path: Path) -> None:
    net = resnet20().eval()
    data = ptq.CalibrationDataModule.from_loaders([torch.randn(16, 3, 32, 32)], calibration_samples=16)
    module = ptq.PTQModule(net, QuantConfig(4, 4), "nearest", batch_size=8, seed=0)
    trainer(tmp_path, logger=False).fit(module, datamodule=data)
    sizes = ptq.save_packed(module, tmp_path / "model.ptq")
    torch.save(net.state_dict(), tmp_path / "float.pt")
    assert (tmp_path / "model.ptq").stat().st_size * 7.0 <= (tmp_path / "float.pt").stat().st_size
    promised = sum(
        layer.weight_bits * module.student.find(layer.name).weight.numel()
        for layer in module.chains.layers  # type: ignore[operator,union-attr]
    )
    assert promised / 8 <= sizes["weights"] <= promised / 8 + len(module.chains.layers)


def damaged(content: bytes, where: int) -> bytes:
    return content[:where] + bytes([content[where] ^ 0x55]) + content[where + 1 :]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Every 97th byte changed, and the file cut at every 97th byte."""
    module = fitted(tmp_path, QuantConfig(2, 2))
    path, bad = tmp_path / "model.ptq", tmp_path / "bad.ptq"
    ptq.save_packed(module, path)
    content = path.read_bytes()
    for where in range(0, len(content), 97):
        for wrong in (damaged(content, where), content[:where]):
            bad.write_bytes(wrong)
            with pytest.raises(PTQError, match=r"bad.ptq' (is damaged|was changed|is a safetensors file)"):
                ptq.load_packed(bad, TinyNet())


def test_what_is_no_packed_file_of_this_model_is_refused(tmp_path: Path) -> None:
    module = fitted(tmp_path, QuantConfig(4, 4))
    path = tmp_path / "model.ptq"
    ptq.save_packed(module, path)
    with pytest.raises(PTQError, match="exists and is kept"):
        ptq.save_packed(module, path)
    ptq.save_packed(module, path, overwrite=True)
    with pytest.raises(PTQError, match=r"is of another model \(TinyNet\): 'act_log_scale'"):
        ptq.load_packed(path, resnet20())
    with pytest.raises(PTQError, match="is no file"):
        ptq.load_packed(tmp_path / "nowhere.ptq", TinyNet())
    save_file({"a": torch.ones(2)}, str(tmp_path / "other.ptq"))
    with pytest.raises(PTQError, match="not one that save_packed wrote"):
        ptq.load_packed(tmp_path / "other.ptq", TinyNet())
    torch.save({"a": 1}, tmp_path / "pickle.ptq")
    with pytest.raises(PTQError, match="damaged or no packed file"):
        ptq.load_packed(tmp_path / "pickle.ptq", TinyNet())
    tensors = load_file(str(path))
    told = json.dumps({"format": 2, "lightning_ptq": "9.0", "model": "TinyNet"})
    save_file(tensors, str(tmp_path / "later.ptq"), {"lightning_ptq": told, "sha256": digest(tensors, told)})
    with pytest.raises(PTQError, match=r"has format 2.*written by 9.0"):
        ptq.load_packed(tmp_path / "later.ptq", TinyNet())
    with pytest.raises(PTQError, match="have no ranges yet"):
        ptq.save_packed(tiny_module(), tmp_path / "new.ptq")
    assert not list(tmp_path.glob(".*"))
