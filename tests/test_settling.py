"""A unit whose error has settled goes through the rest of its schedules in a fifth of its steps, and then rests."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ptq import PTQError
from lightning_ptq.settling import Settling
from tests.helpers import quantization_state, tiny_data, tiny_module, trainer


@given(steps=st.integers(1, 200), errors=st.lists(st.floats(0, 10), min_size=12, max_size=12), share=st.floats(0, 0.99))
def test_schedules_are_gone_through_without_a_leap(steps: int, errors: list[float], share: float) -> None:
    settling, progress, looks = Settling(share), [], iter(errors)
    settling.enter(0)
    for step in range(steps):
        if settling.looks(step, steps):
            settling.look(next(looks), step, steps)
        progress.append(settling.progress(step, steps))
    assert progress[0] == 0.0
    gaps = [b - a for a, b in pairwise(progress)]
    # Never slower than without, up to the end, and at most as fast as four fifths in a fifth of the steps.
    assert all(
        1 / steps - 1e-9 <= gap <= 4.0 / steps + 1e-9 for gap, at in zip(gaps, progress[1:], strict=False) if at < 1
    )
    assert settling.since is not None or progress == [step / steps for step in range(steps)]


def test_it_settles_where_the_error_falls_too_little() -> None:
    settling = Settling(0.1)
    settling.enter(3)
    looks = [step for step in range(100) if settling.looks(step, 100)]
    assert looks == [20, 30, 40, 50, 60, 70]
    for step, error in zip(looks, (1.0, 0.8, 0.73, 0.5), strict=False):
        settling.look(error, step, 100)
        assert settling.since == (0.4 if step >= 40 else None)
        if settling.since is not None:
            break
    assert [settling.progress(step, 100) for step in (40, 50, 60, 99)] == pytest.approx([0.4, 0.7, 1.0, 1.0])
    assert Settling(0.1, **settling.to_dict()) == settling
    settling.enter(3)
    assert settling.since == 0.4, "a checkpoint goes on with its unit"
    settling.enter(4)
    assert settling.since is None


class _Watch(L.Callback):
    """The student after every step, by epoch."""

    def __init__(self) -> None:
        self.states: dict[int, list[dict[str, torch.Tensor]]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        state = {key: value.clone() for key, value in quantization_state(module).items()}
        self.states.setdefault(trainer.current_epoch, []).append(state)


def test_a_settled_unit_rests_and_says_so(tmp_path: Path) -> None:
    module, watch = tiny_module(steps_per_unit=20, settle=0.99), _Watch()
    trainer(tmp_path, callbacks=[watch]).fit(module, datamodule=tiny_data())
    units, last = module.reports[:-1], module.reports[-1]
    assert {report.settled_after for report in units} == {0.3}
    assert last.name == "whole-network"
    assert last.settled_after is None
    for epoch in range(len(units)):
        # Settled behind 6 of 20 steps, and at its end behind 4 more.
        states = watch.states[epoch]
        assert any(not torch.equal(states[9][key], states[8][key]) for key in states[9])
        assert all(torch.equal(state[key], states[9][key]) for state in states[10:] for key in state)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), None])
def test_a_share_outside_its_range_is_refused(value: Any) -> None:
    with pytest.raises(PTQError, match="settle="):
        tiny_module(settle=value)
