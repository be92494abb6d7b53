"""Steps that are recorded once and played back: what `gpu_replay` and `cpu_replay` share.

A step of a unit is some hundred short operations. Python takes as long to call them as a CPU to do the smaller ones,
and several times as long as a GPU. What changes from step to step lies in tensors that a recording reads: the
minibatch, the regulariser's exponent, what is dropped; other random numbers come from a generator that it goes on
with. What changes the operations themselves, such as the end of the warm-up, is the step's form: each form has a
recording of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning_ptq.optimizer import Adam

# Gives the loss terms by name and their sum, the loss.
Compute = Callable[[], tuple[dict[str, Tensor], Tensor]]
_Recording = TypeVar("_Recording")


class Numbers:
    """Numbers that change from step to step, where a recording can read them: each in a tensor of its own."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, value: float, device: torch.device) -> Tensor:
        """`value`, in the tensor () called `name`; it is written to without waiting."""
        if name not in self._tensors or self._tensors[name].device != device:
            self._tensors[name] = torch.zeros((), device=device)
        return self._tensors[name].fill_(value)


class Replay(ABC, Generic[_Recording]):
    """The recordings of one unit."""

    def __init__(self) -> None:
        self.recordings: dict[Hashable, _Recording] = {}
        self._taken: Counter[Hashable] = Counter()
        self._possible = True

    def forget(self) -> None:
        """Drop the recordings, and the memory that they hold; the next unit has others."""
        self.recordings.clear()
        self._taken.clear()
        self._possible = True

    @abstractmethod
    def take(
        self,
        form: Hashable,
        compute: Compute,
        optimizer: Adam,
        trained: Iterable[nn.Parameter],
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One step: `compute`'s terms and loss; `optimizer` is told what else of the step was done.

        Args:
            form: steps of equal form are the same operations on the same tensors.
            trained: parameters that get gradients.
            generator: of random numbers that `compute` draws, seeded for this step.
        """


def clear_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leave the parameters without gradients, so that the next backward pass gives them new ones."""
    for parameter in parameters:
        parameter.grad = None
