"""Recorded steps on a CPU: the operations of forward and backward pass without what Python and autograd add."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from lightning_ptq.functional import in_float32, laid_out_as
from lightning_ptq.optimizer import Adam
from lightning_ptq.replay import Compute, Replay
from lightning_ptq.tape import Tape

# Whose layers and functions are made of torch's operations.
_KNOWN = ("torch", "torchvision", "timm", "lightning_ptq", "builtins", "operator", "_operator", "math")
# The loss terms by name, the loss, and the gradient of each parameter that gets one.
_Step = tuple[dict[str, Tensor], Tensor, Sequence[Tensor | None]]


class CpuReplay(Replay[Callable[[], _Step]]):
    """Each form's first step is taken as usual, the second is recorded, the third proves the recording.

    It is played back next to the step as usual, on another minibatch, and has to give the same bits. If it does not, if
    the way of a step depends on numbers that it computes, or if a tape can't take it, the unit's steps go on as usual.
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
            step = self._record(form, compute, trained, generator)
        if not self._possible:
            self.recordings.clear()
        terms, loss, gradients = step
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.differentiated = True
        return terms, loss

    def _played(self, recording: Callable[[], _Step]) -> _Step:
        with in_float32(torch.device("cpu")):  # casts are on the tape
            return recording()

    def _record(
        self, form: Hashable, compute: Compute, trained: list[nn.Parameter], generator: torch.Generator
    ) -> _Step:
        states, tape = _states(generator), Tape()
        try:
            with tape:
                step = _differentiated(compute, trained)
        except RuntimeError:  # of an operation that no mode may see; else it comes again
            self._possible = False
            _set_states(generator, states)
            return _differentiated(compute, trained)
        self._possible = tape.faithful
        if tape.faithful:
            self._unproven[form] = tape.again(step)
        return step

    def _prove(
        self, form: Hashable, compute: Compute, trained: list[nn.Parameter], generator: torch.Generator
    ) -> _Step:
        states = _states(generator)
        step = _differentiated(compute, trained)
        _set_states(generator, states)
        recording = self._unproven.pop(form)
        try:
            self._possible = _same(step, self._played(recording))
        except RuntimeError:  # tensors have other shapes this time
            self._possible = False
        if self._possible:
            self.recordings[form] = recording
        return step


def can_be_taped(module: nn.Module) -> bool:
    """Whether no code runs inside `module` that a tape would not see: a user's layer or function, or a hook.

    A hook that comes later in a unit does not run where steps are played back.
    """
    if _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks:
        return False
    modules = list(module.modules())
    called = (n.target for m in modules if isinstance(m, fx.GraphModule) for n in m.graph.nodes if callable(n.target))
    return all(map(_is_known, {*called, *map(type, modules)})) and not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )


def _is_known(code: Any) -> bool:
    """Whether a class or function calls torch and goes by no numbers; what is not written in Python can't but do so."""
    return not isinstance(code, type | FunctionType) or code.__module__.split(".")[0] in _KNOWN


def _states(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return generator.get_state(), torch.get_rng_state()


def _set_states(generator: torch.Generator, states: tuple[Tensor, Tensor]) -> None:
    generator.set_state(states[0])
    torch.set_rng_state(states[1])


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
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(*(_bits(x) for x in (a, b)))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, Sequence):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b


def _bits(x: Tensor) -> Tensor:
    return x.detach().flatten().view(torch.uint8)
