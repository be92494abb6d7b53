"""Recorded steps on a CPU are the same steps, bit by bit; what can't be recorded is calibrated all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQModule, QuantConfig, taking
from lightning_ptq.cpu_replay import CpuReplay, can_be_taped
from lightning_ptq.losses import Term, UnitBatch
from lightning_ptq.optimizer import Adam
from lightning_ptq.tape import Tape
from tests.helpers import assert_equal_states, quantization_state, tiny_data, tiny_module, tiny_net, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")


@pytest.fixture(autouse=True)
def _any_number_of_steps_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "WORTH_A_TAPE", 1)


class Recordings(L.Callback):
    """Counts recordings."""

    def __init__(self) -> None:
        self.most = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: PTQModule, *args: Any) -> None:  # type: ignore[override]
        self.most = max(self.most, len(module._replay.recordings))


def fit(folder: Path, of: Callable[[], PTQModule], **changes: Any) -> tuple[PTQModule, int]:
    module, counter = of(), Recordings()
    running = trainer(folder, callbacks=[counter], **{"log_every_n_steps": 4} | changes)
    running.fit(module, datamodule=tiny_data())
    return module, counter.most


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"contrastive": True},
        {"method": "pdquant"},
        {"method": "flexround"},
        {"method": "brecq", "network_rounding_lr": 1e-3},
        {"steps_per_batch": 7},
    ],
    ids=str,
)
def test_recorded_steps_are_the_same_steps(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = {"steps_per_unit": 30, "network_steps": 9} | changes
    fits = [
        fit(tmp_path / str(on), lambda on=on: tiny_module(record_steps=on, **settings))  # type: ignore[misc]
        for on in (True, False)
    ]
    (recorded, count), (usual, none) = fits
    assert count >= 2
    assert none == 0
    assert_equal_states(quantization_state(recorded), quantization_state(usual))
    assert recorded.session.curves == usual.session.curves


def test_a_recording_reads_what_changes(tmp_path: Path) -> None:
    """Half precision casts anew what a step has changed."""
    settings = {"steps_per_unit": 30}
    modules = [
        fit(tmp_path / str(on), lambda on=on: tiny_module(record_steps=on, **settings), precision="bf16-mixed")[0]  # type: ignore[misc]
        for on in (True, False)
    ]
    assert_equal_states(*map(quantization_state, modules))


def test_resume_in_the_middle_of_recorded_steps(tmp_path: Path) -> None:
    def fitted(name: str, max_steps: int = -1, ckpt_path: Path | None = None) -> PTQModule:
        module = tiny_module(steps_per_unit=60, contrastive=True)
        trainer(tmp_path / name, max_steps=max_steps).fit(module, datamodule=tiny_data(), ckpt_path=ckpt_path)
        return module

    whole = fitted("whole")
    fitted("stopped", max_steps=115)
    resumed = fitted("resumed", ckpt_path=tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert_equal_states(quantization_state(resumed), quantization_state(whole))


class Peeking(nn.Module):
    """Goes by a number that it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0 if float(x.detach().sum()) > 0.0 else x


class Keeping(Term):
    """Goes by what it remembers in Python, and says that it may be recorded all the same."""

    recordable = True

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, batch: UnitBatch) -> Tensor:
        self.seen += 1
        return batch.student_out.square().mean() * self.seen


def test_user_layers_and_hooks_are_not_recorded() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert can_be_taped(net)
    assert not can_be_taped(nn.Sequential(net, Peeking()))
    net[0].register_forward_hook(lambda *args: None)
    assert not can_be_taped(net)


def test_a_network_with_a_user_s_layer_is_calibrated_without_recordings(tmp_path: Path) -> None:
    net = tiny_net()
    net.blocks = nn.Sequential(net.blocks[0], Peeking(), net.blocks[1]).eval()
    settings: dict[str, Any] = {"steps_per_unit": 6, "batch_size": 8, "seed": 0, "leaf_modules": ["blocks.1"]}
    module, count = fit(tmp_path, lambda: PTQModule(net, QuantConfig(2, 2), **settings))
    assert count == 0
    assert len(module.reports) == len(module.epoch_names)


def take(replay: CpuReplay, compute: Callable[[], Tensor], parameter: nn.Parameter) -> tuple[Tensor, Tensor | None]:
    """A step's loss, and its gradient if the replay gave one."""
    optimizer = Adam([parameter], fused=True)
    terms, loss = replay.take(
        "form", lambda: ({"loss": (found := compute())}, found), optimizer, [parameter], torch.Generator()
    )
    assert terms["loss"].detach() == loss.detach()
    return loss.detach(), parameter.grad if optimizer.differentiated else None


def test_what_a_recording_does_not_see_is_found_out_before_it_is_used() -> None:
    """A number that Python counts up is a constant of the recording, which gives something else than the next step."""
    replay, weight, count = CpuReplay(), nn.Parameter(torch.randn(3)), [0]

    def counting() -> Tensor:
        count[0] += 1
        return (weight * count[0]).square().sum()

    for step in range(1, 6):
        loss, gradient = take(replay, counting, weight)
        assert loss == (weight.detach() * step).square().sum()
        if gradient is not None:
            torch.testing.assert_close(gradient, 2 * step**2 * weight.detach())
    assert not replay.recordings


def test_a_step_that_goes_by_its_numbers_is_not_recorded() -> None:
    replay, weight = CpuReplay(), nn.Parameter(torch.ones(3))
    for sign in (1.0, 1.0, 1.0, -1.0, -1.0):
        with torch.no_grad():
            weight.fill_(sign)
        loss, _ = take(replay, lambda: weight.sum() if float(weight.detach().sum()) > 0 else 2 * weight.sum(), weight)
        assert loss == (3.0 if sign > 0 else -6.0)
    assert not replay.recordings


def test_a_step_that_changes_what_was_there_is_not_recorded() -> None:
    """Proving the recording would change it twice."""
    replay, weight, state = CpuReplay(), nn.Parameter(torch.ones(3)), torch.zeros(())

    def moving() -> Tensor:
        state.add_(1.0)
        return weight.sum() * state

    losses = [float(take(replay, moving, weight)[0]) for _ in range(5)]
    assert losses == [3.0, 6.0, 9.0, 12.0, 15.0]
    assert not replay.recordings


def test_random_numbers_of_a_recording_are_those_of_the_step() -> None:
    generator, weight = torch.Generator(), nn.Parameter(torch.ones(100))
    runs = []
    for recorded in (True, False):
        replay, losses = CpuReplay(), []
        for step in range(6):
            generator.manual_seed(step)

            def compute() -> tuple[dict[str, Tensor], Tensor]:
                loss = (weight * torch.rand(100, generator=generator)).sum()
                return {"loss": loss}, loss

            optimizer = Adam([weight], fused=True)
            _, loss = replay.take(0, compute, optimizer, [weight], generator) if recorded else compute()
            losses.append(float(loss.detach()))
        assert bool(replay.recordings) == recorded
        runs.append(losses)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_tape_does_again_what_was_done(layout: torch.memory_format) -> None:
    x = torch.randn(4, 6, 5, 5).contiguous(memory_format=layout)
    conv, norm = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8).eval()
    parameters = [*conv.parameters(), *norm.parameters()]

    def done() -> tuple[Tensor, ...]:
        y = norm(conv(x)).relu_()
        y = torch.cat([y, y.flip(1)], 1).split(8, 1)[1] * torch.tensor(float("inf")).reciprocal().add(0.5)
        y[:, 0] += 1.0
        loss = y.logsumexp((2, 3)).mean()
        return loss, *torch.autograd.grad(loss, parameters)

    with (tape := Tape()):
        first = done()
    again = tape.again(first)
    assert tape.faithful
    for _ in range(2):
        x.normal_()
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_()
        for a, b in zip(done(), again(), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


def test_a_tape_keeps_nothing_alive() -> None:
    with (tape := Tape()):
        x = torch.ones(1000).mul(2.0)
        x = x.mul(3.0)
    assert len(tape._nodes) == 1
