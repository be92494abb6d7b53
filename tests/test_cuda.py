"""The same calibration on a CUDA device; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_ptq import PTQModule, QuantConfig
from lightning_ptq.drop import DropMask
from lightning_ptq.functional import fake_quantize
from lightning_ptq.losses import reconstruction_loss
from lightning_ptq.quantizers import ActQuantizer
from lightning_ptq.store import Store, take
from tests.helpers import (
    assert_equal_states,
    quantization_state,
    tiny_data,
    tiny_images,
    tiny_module,
    tiny_net,
    trainer,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What the tests ask for: a fit beside the GPU, and torch's word on waiting.
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]


@pytest.fixture(autouse=True)
def _waiting_is_allowed() -> Iterator[None]:
    """Whatever a test that failed has left."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("cache", ["device", "host", "disk"])
def test_a_fit_on_the_gpu(tmp_path: Path, precision: str, contrastive: bool, cache: str) -> None:
    module = tiny_module(contrastive=contrastive, cache=cache, steps_per_unit=30)
    trainer(tmp_path, accelerator="cuda", precision=precision).fit(module, datamodule=tiny_data())
    assert len(module.reports) == 5
    assert sum(report.accepted for report in module.reports) >= 2
    assert all(value.isfinite().all() for value in quantization_state(module).values())


def test_ranges_equal_those_of_the_cpu(tmp_path: Path) -> None:
    states = []
    for accelerator in ("cpu", "cuda"):
        module = tiny_module(method="nearest")
        trainer(tmp_path / accelerator, accelerator=accelerator).fit(module, datamodule=tiny_data())
        states.append({k: v.cpu() for k, v in quantization_state(module).items()})
    for key in states[0]:
        torch.testing.assert_close(states[1][key], states[0][key], rtol=1e-3, atol=1e-4, msg=key)


def test_tiers_are_bit_equal_on_the_gpu(tmp_path: Path) -> None:
    """What lies in host memory is pinned, and so are the rows that are copied while the GPU computes."""
    states = []
    for cache in ("device", "host", "disk"):
        module = tiny_module(cache=cache, steps_per_unit=30)
        trainer(tmp_path / cache, accelerator="cuda", deterministic=True).fit(module, datamodule=tiny_data())
        states.append(quantization_state(module))
    for state in states[1:]:
        assert_equal_states(state, states[0])


def test_rows_come_from_host_memory_without_waiting() -> None:
    device, x = torch.device("cuda"), torch.randn(64, 3, 8, 8)
    store = Store(device, "host")
    there = store.put(x)
    assert there.is_pinned()
    drawn = [torch.randperm(64)[:8] for _ in range(50)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = [take(there, index, device) for index in drawn]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for index, found in zip(drawn, rows, strict=True):
        assert torch.equal(found.cpu(), x[index])


def test_resume_on_the_gpu(tmp_path: Path) -> None:
    whole = tiny_module()
    trainer(tmp_path / "whole", accelerator="cuda", deterministic=True).fit(whole, datamodule=tiny_data())
    stopped = tiny_module()
    trainer(tmp_path / "stopped", accelerator="cuda", deterministic=True, max_steps=9).fit(
        stopped, datamodule=tiny_data()
    )
    module = tiny_module()
    trainer(tmp_path / "resumed", accelerator="cuda", deterministic=True).fit(
        module, datamodule=tiny_data(), ckpt_path=tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    )
    assert_equal_states(quantization_state(module), quantization_state(whole))


def test_fake_quantization_equals_the_cpu() -> None:
    x = torch.randn(4, 8, 16, 16)
    results = []
    for device in ("cpu", "cuda"):
        q = ActQuantizer(4).to(device)
        q.set_range(torch.tensor(0.3, device=device), torch.tensor(7.0, device=device))
        q.log_scale.requires_grad_(True)
        z = x.to(device).detach().requires_grad_(True)
        y = q(z)
        (y * y.detach().cos()).sum().backward()
        results.append([t.detach().cpu() for t in (y, z.grad, q.log_scale.grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_drop_masks_follow_the_seed() -> None:
    mask = DropMask(0.5)
    x = torch.empty(100_000, device="cuda")
    mask.seed(0, 1)
    first, second = (mask.keep(x).mask(x) for _ in range(2))
    mask.seed(0, 1)
    assert torch.equal(mask.keep(x).mask(x), first)
    mask.seed(0, 2)
    for other in (second, mask.keep(x).mask(x)):
        assert abs(float((first * other).mean()) - 0.25) < 0.01
        assert abs(float(other.mean()) - 0.5) < 0.01


def test_a_step_does_not_synchronise() -> None:
    """Reading a device value in a quantizer's forward or backward would stall every step."""
    q = ActQuantizer(4).cuda()
    q.set_range(torch.tensor(0.3, device="cuda"), torch.tensor(7.0, device="cuda"))
    q.log_scale.requires_grad_(True)
    x = tiny_images(4).cuda().requires_grad_(True)
    net = tiny_net().cuda()
    q(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(q(x)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_pass_equals_the_operations_on_the_cpu(dropped: bool, layout: torch.memory_format) -> None:
    x = (3.0 * torch.randn(3, 5, 40, 50)).to(memory_format=layout)
    drop, results = DropMask(0.5 if dropped else 0.0), []
    for device in ("cpu", "cuda"):
        z = x.to(device).detach().requires_grad_()
        log_scale = torch.tensor(-0.1, device=device, requires_grad=True)
        drop.seed(0, 1)
        draw = drop.keep(x.cuda())
        keep = draw if device == "cuda" or draw is None else draw.mask(x.cuda()).cpu()
        y = fake_quantize(z, log_scale, -2.0, 5.0, keep)
        (y * y.detach().cos()).sum().backward()
        results.append([t.detach().cpu() for t in (y, z.grad, log_scale.grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_weighted_error_equals_that_of_the_cpu(layout: torch.memory_format) -> None:
    student, teacher = (torch.randn(3, 5, 40, 50).to(memory_format=layout) for _ in range(2))
    weights, results = torch.rand(5), []
    for device in ("cpu", "cuda"):
        z = student.to(device).detach().requires_grad_()
        loss = reconstruction_loss(z, teacher.to(device), weights.to(device))
        loss.backward()
        results.append([t.detach().cpu() for t in (loss, z.grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


class Recordings(L.Callback):
    """Counts recordings; outside logging steps, whatever waits for the GPU raises."""

    def __init__(self) -> None:
        self.most = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, step: int) -> None:
        told = (step + 1) % 3 == 0 or step + 1 == trainer.num_training_batches  # 20 times for the report
        torch.cuda.set_sync_debug_mode("default" if told or step < 12 else "error")

    def on_train_batch_end(self, trainer: L.Trainer, module: PTQModule, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.most = max(self.most, len(module._replay.recordings))


def test_recorded_steps_several_to_a_batch_are_the_same_steps(tmp_path: Path) -> None:
    states = []
    for each, recorded in ((7, True), (1, False)):
        module = tiny_module(steps_per_unit=60, contrastive=True, steps_per_batch=each, record_steps=recorded)
        running = trainer(tmp_path / str(each), accelerator="cuda", deterministic=True)
        running.fit(module, datamodule=tiny_data())
        states.append(quantization_state(module))
    assert_equal_states(states[0], states[1])


@pytest.mark.parametrize("changes", [{}, {"contrastive": True}, {"method": "pdquant"}, {"method": "flexround"}])
def test_recorded_steps_are_the_same_steps(tmp_path: Path, changes: dict[str, Any]) -> None:
    states, counts = [], []
    for recorded in (True, False):
        module, counter = tiny_module(steps_per_unit=60, record_steps=recorded, **changes), Recordings()
        folder = tmp_path / str(recorded)
        settings = {"log_every_n_steps": 60, "callbacks": [counter]}
        trainer(folder, accelerator="cuda", deterministic=True, **settings).fit(module, datamodule=tiny_data())
        states.append(quantization_state(module))
        counts.append(counter.most)
    assert counts[0] >= 2
    assert counts[1] == 0
    assert_equal_states(states[0], states[1])


def test_resume_in_the_middle_of_recorded_steps(tmp_path: Path) -> None:
    def fit(name: str, max_steps: int = -1, ckpt_path: Path | None = None) -> PTQModule:
        module = tiny_module(steps_per_unit=60, contrastive=True, steps_per_batch=3)
        running = trainer(tmp_path / name, accelerator="cuda", deterministic=True, max_steps=max_steps)
        running.fit(module, datamodule=tiny_data(), ckpt_path=ckpt_path)
        return module

    whole = fit("whole")
    fit("stopped", max_steps=32)
    resumed = fit("resumed", ckpt_path=tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert_equal_states(quantization_state(resumed), quantization_state(whole))


class Peeking(nn.Module):
    """Waits for the GPU in the middle of its forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0 if float(x.detach().sum()) > 1e9 else x


def test_what_cannot_be_recorded_is_calibrated_all_the_same(tmp_path: Path) -> None:
    net = tiny_net()
    net.blocks = nn.Sequential(net.blocks[0], Peeking(), net.blocks[1]).eval()
    settings: dict[str, Any] = {"steps_per_unit": 30, "batch_size": 8, "seed": 0, "leaf_modules": ["blocks.1"]}
    states = []
    for recorded in (True, False):
        module = PTQModule(net, QuantConfig(2, 2), record_steps=recorded, **settings)
        running = trainer(tmp_path / str(recorded), accelerator="cuda", deterministic=True)
        with pytest.warns(UserWarning, match="can't be recorded") if recorded else nullcontext():
            running.fit(module, datamodule=tiny_data())
        states.append(quantization_state(module))
    assert_equal_states(states[0], states[1])
