"""Recorded steps on a CPU: the operations of forward and backward pass without what Python and autograd add."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.functional import in_float32, laid_out_as
from lightning_ptq.optimizer import Adam
from lightning_ptq.replay import Compute, Replay
from lightning_ptq.tape import Tape

# The loss terms by name, the loss, and the gradient of each parameter that gets one.
_Step = tuple[dict[str, Tensor], Tensor, Sequence[Tensor | None]]


class CpuReplay(Replay[Callable[[], _Step]]):
    """Each form's first step is taken as usual, the second is recorded, the third proves the recording.

    It is played back next to the step as usual, on another minibatch, and has to give the same bits; if it does not, or
    if the unit's way depends on numbers that it computes, the unit's steps go on as usual.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unproven: dict[Hashable, Callable[[], _Step]] = {}

    def forget(self) -> None:
        super().forget()
        self._unproven.clear()

    def take(
        self,
        form: Hashable,
        compute: Compute,
        optimizer: Adam,
        trained: Iterable[nn.Parameter],
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], Tensor]:
        self._taken[form] += 1
        trained = list(trained)
        if form in self.recordings:
            step = self._played(self.recordings[form])
        elif not self._possible or self._taken[form] == 1:
            return compute()
        elif form in self._unproven:
            step = self._prove(form, compute, trained, generator)
        else:
            step = self._record(form, compute, trained)
        terms, loss, gradients = step
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.differentiated = True
        return terms, loss

    def _played(self, recording: Callable[[], _Step]) -> _Step:
        with in_float32(torch.device("cpu")):  # casts are on the tape
            return recording()

    def _record(self, form: Hashable, compute: Compute, trained: list[nn.Parameter]) -> _Step:
        with (tape := Tape()):
            step = _differentiated(compute, trained)
        if tape.faithful:
            self._unproven[form] = tape.again(step)
        self._possible = tape.faithful
        return step

    def _prove(
        self, form: Hashable, compute: Compute, trained: list[nn.Parameter], generator: torch.Generator
    ) -> _Step:
        states = generator.get_state(), torch.get_rng_state()
        step = _differentiated(compute, trained)
        generator.set_state(states[0])
        torch.set_rng_state(states[1])
        recording = self._unproven.pop(form)
        if _same(step, self._played(recording)):
            self.recordings[form] = recording
        else:
            self._possible = False
        return step


def can_be_taped(module: nn.Module) -> bool:
    """Whether no code runs inside `module` that a tape would not see: a user's layer, or a hook."""
    return all(
        type(m).__module__.split(".")[0] in ("torch", "lightning_ptq")
        and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        for m in module.modules()
    )


def _differentiated(compute: Compute, trained: list[nn.Parameter]) -> _Step:
    terms, loss = compute()
    with in_float32(loss.device):
        found = torch.autograd.grad(loss, trained, allow_unused=True)
    # The optimizer takes gradients to lie in memory as parameters do.
    gradients = [g if g is None else laid_out_as(g, p) for g, p in zip(found, trained, strict=True)]
    return {name: term.detach() for name, term in terms.items()}, loss.detach(), gradients


def _same(a: Any, b: Any) -> bool:
    """Whether two steps are equal bit by bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, Sequence):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b
