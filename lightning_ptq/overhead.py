"""Less of what Lightning's loop costs at each step: with a small network that is a tenth of the time.

Per step it enters some fifty contexts of a profiler that does nothing, each a generator, and sets one attribute of the
module thirty times, each by way of `nn.Module`'s search for parameters (`python -m benchmarks.step` measures the rest).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler

_NOTHING = nullcontext()


class NoProfiler(PassThroughProfiler):
    """Lightning's profiler that does nothing, without a generator for each action."""

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        """A context that does nothing."""
        return _NOTHING


def without_profiler(trainer: L.Trainer) -> None:
    """Replace the Trainer's profiler if it is the one that does nothing."""
    if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
        trainer.profiler = NoProfiler()  # type: ignore[attr-defined]


class QuickName:
    """Mixin for a LightningModule: the name of the hook that runs is set without a search."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)
