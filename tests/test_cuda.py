"""The same calibration on a CUDA device; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_ptq.drop import DropMask
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

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
        z = x.to(device).requires_grad_(True)
        y = q(z)
        (y * y.detach().cos()).sum().backward()
        results.append([t.detach().cpu() for t in (y, z.grad, q.log_scale.grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_drop_masks_follow_the_seed() -> None:
    mask = DropMask(0.5)
    x = torch.empty(100_000, device="cuda")
    mask.seed(0, 1)
    first = mask.keep(x)
    mask.seed(0, 1)
    assert torch.equal(mask.keep(x), first)
    assert abs(float(first.mean()) - 0.5) < 0.01


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
