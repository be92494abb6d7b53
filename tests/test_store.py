"""Tensors in files against tensors in memory, and what is left of the files."""

from __future__ import annotations

import os
import resource
import signal
import sys
import weakref
from pathlib import Path

import pytest
import torch

from lightning_ptq import PTQError, store
from lightning_ptq.allocator import give_back_freed_memory, keep_freed_memory
from lightning_ptq.cache import gathered
from lightning_ptq.store import Store, Tier, chunks, is_channels_last, readable, release, run_chunked, take

CPU = torch.device("cpu")


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_tensor_is_the_same_on_every_tier(tmp_path: Path, tier: Tier, channels_last: bool) -> None:
    store = Store(CPU, tier, tmp_path)
    x = torch.randn(70, 3, 5, 4)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    there = store.put(x)
    release()
    assert torch.equal(there, x)
    assert is_channels_last(there) == channels_last
    doubled = run_chunked(lambda some: 2 * some, there, CPU, store)
    assert torch.equal(doubled, 2 * x)
    assert is_channels_last(doubled) == channels_last
    rows = take(there, torch.tensor([69, 0, 3]), CPU)
    assert torch.equal(rows, x[[69, 0, 3]])
    assert is_channels_last(rows) == channels_last
    assert torch.equal(torch.cat(list(chunks(there, 16))), x)
    assert list(tmp_path.iterdir()) == []


def test_rounded_tensors_are_computed_with_in_float32(tmp_path: Path) -> None:
    x = torch.randn(5, 7)
    for tier in ("host", "disk"):
        store = Store(CPU, tier, tmp_path, "bfloat16")
        kept = run_chunked(lambda some: some + 1, x, CPU, store, exact=False)
        assert torch.equal(kept, (x + 1).bfloat16())
        assert run_chunked(lambda some: some + 1, x, CPU, store).dtype == torch.float32
        assert torch.equal(run_chunked(lambda some: some / 3, kept, CPU, store), kept.float() / 3)
        assert take(kept, torch.tensor([1]), CPU).dtype == torch.float32


def resident(*kinds: str) -> int:
    """KiB of this process's memory of these kinds."""
    status = Path("/proc/self/status").read_text()
    return sum(int(status.split(f"{kind}:")[1].split()[0]) for kind in kinds)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
@pytest.mark.parametrize("on_disk", [False, True])
def test_holes_that_freed_blocks_left_stay_unless_activations_are_in_files(
    tmp_path: Path, on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not keep_freed_memory():
        pytest.skip("no glibc")
    monkeypatch.setattr(store, "_mapped", weakref.WeakSet())  # no files of other tests
    there = Store(CPU, "disk" if on_disk else "host", tmp_path).empty((4, 2), torch.float32)
    blocks = [torch.ones(2**20) for _ in range(64)]  # of 4 MiB
    del blocks[::2]
    kept = resident("RssAnon")
    for _ in chunks(there):
        pass
    given_back = kept - resident("RssAnon")
    give_back_freed_memory()
    freed = 128 * 2**10  # KiB
    assert given_back > 0.75 * freed if on_disk else given_back < 0.1 * freed
    assert len(blocks) == 32


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_what_was_read_or_written_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Of the process; and what is released is not lost."""
    kinds = ("RssFile", "RssAnon")
    give_back_freed_memory()  # or the walk would
    x = Store(CPU, "disk", tmp_path).empty((64, 2**18), torch.float32)  # 64 MiB
    x[:4] = 0.0  # whatever the first use allocates
    release()
    before, most = resident(*kinds), 0
    for some in chunks(x, 4):
        some.fill_(1.0)
        most = max(most, resident(*kinds))
    assert most - before < 3 * 4 * 2**10, "KiB: no more than some parts"
    assert sum(float(some.sum()) for some in chunks(x, 4)) == x.numel()


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_is_killed_leaves_no_file(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            x = Store(CPU, "disk", tmp_path).empty((4, 1000), torch.float32).fill_(1)
            os.kill(os.getpid(), signal.SIGKILL)
            assert len(x)  # alive until here
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_files_and_their_room_go_with_the_tensors(tmp_path: Path) -> None:
    def opened() -> int:
        return sum("deleted" in line for line in Path("/proc/self/maps").read_text().splitlines())

    if not sys.platform.startswith("linux"):
        pytest.skip("/proc is Linux's")
    before = opened()
    x = Store(CPU, "disk", tmp_path).empty((4, 1000), torch.float32)
    assert opened() == before + 1
    del x
    assert opened() == before


def test_a_disk_without_room_is_one_sentence(tmp_path: Path) -> None:
    """A limit of file sizes fails like a full disk does: before anything is written."""
    store = Store(CPU, "disk", tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(PTQError, match=r"can.t hold 39\.1 KiB of cached activations.*`cache_folder`"):
            store.empty((10, 1000), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(PTQError, match="Permission denied"):
            store.empty((10, 1000), torch.float32)


def test_sizes_are_told_in_a_unit_that_suits() -> None:
    assert [readable(n) for n in (0, 1, 1023, 1024, 1536, 2**20 * 5, 7 * 2**30 // 2, 2**50)] == [
        *("0 B", "1 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.5 GiB", "1024.0 TiB")
    ]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_rows_come_into_the_memory_of_earlier_ones(
    tmp_path: Path, layout: torch.memory_format, dtype: torch.dtype, tier: Tier
) -> None:
    images = torch.randn(12, 3, 4, 5).to(dtype).contiguous(memory_format=layout)
    tensors = [Store(CPU, tier, tmp_path).put(images), torch.randn(12, 7)]
    first, second = torch.tensor([3, 0, 11]), torch.tensor([5, 5, 2])
    earlier = gathered(tensors, (first, first), CPU)
    places = [x.data_ptr() for x in earlier]
    again = gathered(tensors, (second, second), CPU, earlier)
    assert [x.data_ptr() for x in again] == places
    for found, x in zip(again, (*tensors, torch.arange(12)), strict=True):
        assert torch.equal(found, x[second].float() if x.is_floating_point() else x[second])
    assert is_channels_last(again[0]) == (layout == torch.channels_last)
