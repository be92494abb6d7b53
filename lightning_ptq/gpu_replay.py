"""Recorded steps on a GPU: forward pass, backward pass and the optimizer's step as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_ptq.functional import in_float32
from lightning_ptq.optimizer import Adam
from lightning_ptq.replay import Compute, Replay, clear_gradients

# Steps of each form that are taken as usual before one is recorded: kernels are chosen and compiled in them, and what
# is worked out once for each unit is.
WARM_UP = 3


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    terms: dict[str, Tensor]
    loss: Tensor


class GpuReplay(Replay[_Recording]):
    """Recordings of one GPU's steps; they lie in its memory, and so do rates."""

    def take(
        self,
        form: Hashable,
        compute: Compute,
        optimizer: Adam,
        trained: Iterable[nn.Parameter],
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], Tensor]:
        recording = self.recordings.get(form)
        if recording is None and self._possible and self._taken[form] >= WARM_UP:
            recording = self._record(compute, optimizer, trained, generator)
            self._possible = recording is not None
            if recording is not None:
                self.recordings[form] = recording
        if recording is None:
            self._taken[form] += 1
            return compute()
        recording.graph.replay()
        optimizer.differentiated = optimizer.stepped = True
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
        pool = next((other.graph.pool() for other in self.recordings.values()), None)  # they never run at once
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
                "Set record_steps=False to leave the attempt out.",
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
