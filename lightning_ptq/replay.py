"""Steps on a GPU, recorded once as CUDA graphs and played back from then on.

A step of a unit is some two hundred short operations, and Python takes several times as long to launch them as the GPU
to run them. A recording holds forward pass, backward pass and the optimizer's step. What changes from step to step lies
in tensors that it reads: the minibatch, rates, the regulariser's exponent, the seed of what is dropped; other random
numbers come from a generator that it goes on with. What changes the operations themselves, such as the end of the
warm-up, is the step's form: each form has a recording of its own.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_ptq.functional import in_float32
from lightning_ptq.optimizer import Adam

# Steps of each form that are taken as usual before one is recorded: kernels are chosen and compiled in them, and what
# is worked out once for each unit is.
WARM_UP = 3

# Gives the loss terms by name and their sum, the loss.
Compute = Callable[[], tuple[dict[str, Tensor], Tensor]]


class Numbers:
    """Numbers that change from step to step, where a recording can read them: on a GPU, each in a tensor of its own."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, value: float, device: torch.device) -> float | Tensor:
        """`value`, in the tensor () called `name` if the device is a GPU; it is written to without waiting."""
        if device.type != "cuda":
            return value
        if name not in self._tensors or self._tensors[name].device != device:
            self._tensors[name] = torch.zeros((), device=device)
        return self._tensors[name].fill_(value)


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    terms: dict[str, Tensor]
    loss: Tensor


class Replay:
    """The recordings of one unit."""

    def __init__(self) -> None:
        self._recordings: dict[Hashable, _Recording] = {}
        self._taken: Counter[Hashable] = Counter()
        self._possible = True

    def forget(self) -> None:
        """Drop the recordings, and the memory that they hold; the next unit has others."""
        self._recordings.clear()
        self._taken.clear()
        self._possible = True

    def take(
        self,
        form: Hashable,
        compute: Compute,
        optimizer: Adam,
        trained: Iterable[nn.Parameter],
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One step: `compute`'s terms and loss; where it was played back, `optimizer.stepped` says so.

        Args:
            form: steps of equal form are the same operations on the same tensors.
            trained: parameters that get gradients.
            generator: of random numbers that `compute` draws, seeded for this step.
        """
        recording = self._recordings.get(form)
        if recording is None and self._possible and self._taken[form] >= WARM_UP:
            recording = self._record(compute, optimizer, trained, generator)
            self._possible = recording is not None
            if recording is not None:
                self._recordings[form] = recording
        if recording is None:
            self._taken[form] += 1
            return compute()
        recording.graph.replay()
        optimizer.stepped = True
        return recording.terms, recording.loss

    def _record(
        self,
        compute: Compute,
        optimizer: Adam,
        trained: Iterable[nn.Parameter],
        generator: torch.Generator,
    ) -> _Recording | None:
        """A step, recorded but not taken; None, with a warning, if it does what can't be recorded, such as waiting."""
        trained = list(trained)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        pool = next((other.graph.pool() for other in self._recordings.values()), None)  # they never run at once
        clear_gradients(trained)  # gradients have to lie in the recording's memory
        try:
            # Other threads, that of a logger or of a loader, may go on.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                terms, loss = compute()
                with in_float32(loss.device):
                    loss.backward()
                optimizer.step()
        except RuntimeError as error:
            warnings.warn(
                f"the unit's steps can't be recorded as a CUDA graph and take longer: {str(error).splitlines()[0]} "
                "Set cuda_graphs=False to leave the attempt out.",
                stacklevel=2,
            )
            clear_gradients(trained)
            for stuck in (generator, torch.cuda.default_generators[generator.device.index]):
                _renew(stuck)
            return None
        return _Recording(graph, {name: term.detach() for name, term in terms.items()}, loss.detach())


def _renew(generator: torch.Generator) -> None:
    """Have a generator start again from its seed; one that a failed recording has left can't draw any more."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


def clear_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leave the parameters without gradients, so that the next backward pass gives them new ones."""
    for parameter in parameters:
        parameter.grad = None
