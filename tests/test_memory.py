"""What caches take against what they took, which tier is chosen, and calibrations on all of them."""

from __future__ import annotations

import logging
import re
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQError, QuantConfig, memory
from lightning_ptq.cache import UnitCache
from lightning_ptq.graph import build_chain
from lightning_ptq.memory import CacheSizes, Room, bytes_of, free_memory, unit_shapes
from lightning_ptq.store import Store
from tests.helpers import assert_equal_states, quantization_state, tiny_data, tiny_images, tiny_module, trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [(None, None), (5, 5), ("7", 7), ("12B", 12), ("8GB", 8 * 10**9), ("1.5GiB", 3 * 2**29), ("2 MB", 2 * 10**6)],
)
def test_budgets_have_units(text: Any, size: int | None) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", [0, -1, "", "8G", "8gb", "GB", "1e9", "nan", True, "8GBB", "-3GB"])
def test_a_budget_that_is_no_size_says_what_is(text: Any) -> None:
    with pytest.raises(PTQError, match=re.escape(f"memory_budget={text!r} is no size. Give bytes, or")):
        tiny_module(memory_budget=text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_what_the_caches_take_at_most(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, images = tiny_module(), tiny_images(32)
    shapes = unit_shapes(module.teacher, (3, 8, 8))
    sizes = CacheSizes.of(module.teacher, shapes, 32, dtype)
    made: list[weakref.ref[Tensor]] = []
    empty, most = Store.empty, 0

    def counted(self: Store, *how: Any) -> Tensor:
        nonlocal most
        x = empty(self, *how)
        made.append(weakref.ref(x))
        most = max(most, sum(there.nbytes for ref in made if (there := ref()) is not None))
        return x

    monkeypatch.setattr(Store, "empty", counted)
    cache = UnitCache(module.teacher, module.student, images, Store(CPU, "host", dtype=dtype))
    for k in range(len(module.student)):
        held = {t.data_ptr(): t.nbytes for t in vars(cache).values() if isinstance(t, Tensor)}
        assert sum(held.values()) == sizes.units[k]
        if k + 1 < len(module.student):
            cache.advance(cache.student_out())
    # The images are not the store's own; they are kept as long as it.
    assert most + images.nbytes == sizes.most
    assert sizes.where == "blocks.0"


class Machine(NamedTuple):
    host: int
    disk: int = 2**60
    device: int | None = None


@pytest.mark.parametrize(
    ("machine", "policy", "budget", "tier"),
    [
        (Machine(host=200), "auto", None, "host"),
        (Machine(host=199), "auto", None, "disk"),
        (Machine(host=199), "auto", 150, "host"),  # what is granted may be more than half
        (Machine(host=99), "auto", 150, "disk"),  # but not more than there is
        (Machine(host=2**40), "auto", 99, "disk"),
        (Machine(host=2**40), "disk", None, "disk"),
        (Machine(host=1), "host", None, "host"),
        (Machine(host=1), "device", None, "device"),
        (Machine(host=1, device=200), "auto", None, "device"),
        (Machine(host=200, device=199), "auto", None, "host"),
        (Machine(host=2**40, device=2**40), "auto", 100, "device"),
        (Machine(host=100, device=150), "auto", None, "disk"),
    ],
)
def test_the_first_tier_with_room_is_taken(
    machine: Machine, policy: Any, budget: int | None, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: machine.host)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (machine.device, 2**50))
    device = CPU if machine.device is None else torch.device("cuda")
    sizes = CacheSizes((60,), 10, 100, "conv")
    assert Room(device, budget, Path()).choose(policy, sizes) == tier


def test_processes_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 400)
    sizes = CacheSizes((60,), 10, 100, "conv")
    assert [Room(CPU, None, Path(), n).choose("auto", sizes) for n in (2, 3)] == ["host", "disk"]


def test_no_room_is_said_before_the_work(tmp_path: Path) -> None:
    sizes = CacheSizes((60,), 10, 2**70, "conv")
    with pytest.raises(PTQError, match=r"unit 'conv'\), and the disk of '.*new/er' has .* left\. Make room, choose"):
        Room(CPU, None, tmp_path / "new" / "er").choose("auto", sizes)
    for policy in ("host", "device"):
        module = tiny_module(cache=policy, memory_budget="10kB")
        with pytest.raises(PTQError, match=rf"cache='{policy}' needs 350\.8 KiB .*more than memory_budget=9\.8 KiB"):
            trainer(tmp_path / policy).fit(module, datamodule=tiny_data())
        assert module.reports == []


def test_free_memory_is_some_of_what_there_is() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_memory() < total


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")  # into a folder of its own
def test_calibrations_are_bit_equal_on_all_tiers_and_resumed_on_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With both networks' inputs, corrected ones, the last epoch and its judgement in files."""
    options: dict[str, Any] = {"contrastive": True, "steps_per_unit": 3, "held_out": 0.7}
    whole = tiny_module(cache="host", **options)
    trainer(tmp_path / "host").fit(whole, datamodule=tiny_data(24, more=16))
    # As a budget that is too small chooses it, and stopped in the middle of the second unit.
    with caplog.at_level(logging.INFO):
        stopped = tiny_module(memory_budget="1kB", **options)
        trainer(tmp_path / "disk", max_steps=5).fit(stopped, datamodule=tiny_data(24, more=16))
    place = re.escape(repr(str(tmp_path / "disk")))
    assert re.search(rf"caches: 350\.8 KiB at most \(unit 'blocks\.0'\), on disk below {place}; budget", caplog.text)
    resumed, last = tiny_module(cache="disk", **options), tmp_path / "disk" / "checkpoints" / "last.ckpt"
    trainer(tmp_path / "resumed").fit(resumed, datamodule=tiny_data(24, more=16), ckpt_path=last)
    assert_equal_states(quantization_state(resumed), quantization_state(whole))
    assert [r.mse_after for r in resumed.reports] == [r.mse_after for r in whole.reports]
    other = tiny_module(cache_dtype="bfloat16", **options)
    with pytest.raises(PTQError, match=r"cache_dtype='float32' in the checkpoint, 'bfloat16' here"):
        trainer(tmp_path / "other").fit(other, datamodule=tiny_data(24, more=16), ckpt_path=last)


def test_corrected_and_rounded_caches_are_bit_equal_on_disk(tmp_path: Path) -> None:
    states = []
    for tier in ("host", "disk"):
        module = tiny_module(cache=tier, cache_dtype="bfloat16", method="pdquant", distribution_steps=2)
        trainer(tmp_path / tier, max_epochs=2).fit(module, datamodule=tiny_data())
        states.append(quantization_state(module))
    assert_equal_states(*states)


@pytest.mark.parametrize(("name", "value"), [("cache", "ram"), ("cache_dtype", "float16")])
def test_an_unknown_choice_lists_what_there_is(name: str, value: str) -> None:
    with pytest.raises(PTQError, match=f"{name}='{value}' is unknown. Choose one of"):
        tiny_module(**{name: value})


class _Looks(nn.Module):
    """Computes what depends on the values that it reads: no shape is known without them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if float(x.sum()) > 1e9 else self.conv(x).relu()


def test_shapes_behind_a_module_that_looks_at_values_come_from_an_image() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), _Looks(), nn.Flatten(), nn.Linear(6 * 4 * 4, 5)).eval()
    chain = build_chain(net, QuantConfig(), "block", leaf_modules=["2"]).teacher
    shapes = unit_shapes(chain, (3, 8, 8))
    assert shapes[0] == (3, 8, 8)
    assert shapes[-1] == (5,)
    with pytest.raises(PTQError, match="do not fit the model"):
        unit_shapes(chain, (3, 9, 9))
