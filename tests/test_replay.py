"""Recorded steps on a CPU are the same steps, bit by bit; what can't be recorded is calibrated all the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook

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
        {"contrastive": {"negatives": "bank", "feature": "projection", "every": 2}},
        {"granularity": "layer"},
        {"settle": 0.5},
        {"cache": "disk", "cache_dtype": "bfloat16"},
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


@pytest.mark.usefixtures("both_ways")
def test_recorded_steps_are_the_same_with_operations_in_place_of_kernels(tmp_path: Path) -> None:
    test_recorded_steps_are_the_same_steps(tmp_path, {"steps_per_unit": 15, "network_steps": 5})


def test_a_recording_reads_what_changes(tmp_path: Path) -> None:
    """Half precision casts anew what a step has changed."""
    settings = {"steps_per_unit": 30}
    (recorded, count), (usual, none) = (
        fit(tmp_path / str(on), lambda on=on: tiny_module(record_steps=on, **settings), precision="bf16-mixed")  # type: ignore[misc]
        for on in (True, False)
    )
    assert count > none == 0
    assert_equal_states(quantization_state(recorded), quantization_state(usual))


def test_resume_in_the_middle_of_recorded_steps(tmp_path: Path) -> None:
    """By default, with two steps to a batch from 200 on."""

    def module() -> PTQModule:
        return tiny_module(steps_per_unit=200, network_steps=0, method="adaround")

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:  # type: ignore[override]
            trainer.should_stop = trainer.global_step == 133

    whole, count = fit(tmp_path / "whole", module)
    assert count >= 2
    assert whole.steps_per_batch == 2
    assert whole.trainer.global_step == 4 * 100
    trainer(tmp_path / "stopped", callbacks=[Stop()]).fit(module(), datamodule=tiny_data())
    resumed = module()
    checkpoint = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    trainer(tmp_path / "resumed").fit(resumed, datamodule=tiny_data(), ckpt_path=checkpoint)
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


def doubled_if_large(x: Tensor) -> Tensor:
    return x * 2.0 if float(x.detach().sum()) > 0.0 else x


def test_functions_that_the_graph_calls_by_name_are_looked_at() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.relu, (x := graph.placeholder("x"),)))
    assert can_be_taped(fx.GraphModule(nn.Module(), graph))
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(doubled_if_large, (x,)))
    assert not can_be_taped(fx.GraphModule(nn.Module(), graph))


def test_hooks_of_all_modules_are_looked_at() -> None:
    handle = register_module_forward_hook(lambda *args: None)
    try:
        assert not can_be_taped(nn.ReLU())
    finally:
        handle.remove()


def test_a_subclass_that_looks_at_gradients_sees_each_of_them(tmp_path: Path) -> None:
    seen = []

    class Looking(PTQModule):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(self.global_step)

    module = Looking(
        tiny_net(), QuantConfig(2, 2), steps_per_unit=200, network_steps=0, batch_size=8, method="adaround"
    )
    trainer(tmp_path).fit(module, datamodule=tiny_data())
    assert len(seen) == module.trainer.global_step == 4 * 200


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


@pytest.mark.parametrize("through_a_view", [False, True])
def test_a_step_that_changes_what_was_there_is_not_recorded(through_a_view: bool) -> None:
    """Proving the recording would change it twice."""
    replay, weight, state = CpuReplay(), nn.Parameter(torch.ones(3)), torch.zeros(1)

    def moving() -> Tensor:
        if through_a_view:
            state.view(1, 1)[0].add_(1.0)
        else:
            state.add_(1.0)
        return weight.sum() * state[0]

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
    again = tape.again(x)
    made = weakref.ref(x)
    del x, tape
    assert made() is None
    assert float(again().sum()) == 6000.0


def test_what_no_tape_can_take_is_calibrated_as_usual() -> None:
    replay, weight = CpuReplay(), nn.Parameter(torch.ones(3))

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if torch._C._len_torch_dispatch_stack():
                raise NotImplementedError("no mode may see this")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    losses = [float(take(replay, lambda: Refusing.apply(weight).sum(), weight)[0]) for _ in range(4)]
    assert losses == [3.0] * 4
    assert not replay.recordings
