"""Freed memory: kept while a fit runs, given back behind it."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.soak import resident_kib
from lightning_ptq.allocator import give_back_freed_memory, keep_freed_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_what_was_kept_is_given_back() -> None:
    if not keep_freed_memory():
        pytest.skip("no glibc")
    give_back_freed_memory()
    before = resident_kib()
    blocks = [torch.ones(2**20) for _ in range(64)]  # 4 MiB each
    used = resident_kib()
    del blocks
    kept = resident_kib()
    assert used - before > 200_000
    assert kept - before > 100_000, "freed blocks are reused, not unmapped"
    assert give_back_freed_memory()
    assert resident_kib() - before < 20_000
