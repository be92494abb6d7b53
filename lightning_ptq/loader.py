"""The train loader of a calibration: its epochs are units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning_ptq.cache import Minibatch, sample_index

if TYPE_CHECKING:
    from lightning_ptq.module import PTQModule


class UnitLoader:
    """Minibatches of the current unit's caches, a pure function of (seed, unit, step, rank).

    The body of `__iter__` is the only code that runs exactly once for each real epoch on every way to resume, so a
    unit is entered there. The position is the Trainer's: the loader has no state of its own.
    """

    def __init__(self, module: PTQModule) -> None:
        self.module = module

    def __len__(self) -> int:
        """Steps of the current epoch."""
        return self.module.steps_of(self.module.trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it tells Lightning that resuming in the middle works."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def __iter__(self) -> Iterator[Minibatch]:
        module, trainer = self.module, self.module.trainer
        unit = trainer.current_epoch
        first = trainer.fit_loop.batch_idx + 1
        module.enter_unit(unit, first)
        cache, settling = module.session.opened, module.session.settling
        batch: Minibatch | None = None
        for step in range(first, len(self)):
            progress = settling.progress(step, int(trainer.num_training_batches))
            if batch is not None and progress >= 1.0:  # nothing will be done with it
                yield batch
                continue
            rows = sample_index(cache.drawn, module.batch_size, step, module.seed, unit, module.global_rank)
            # Where the input is no longer mixed with the teacher's, a corrected target would be that of another input.
            # A GPU's minibatches share their memory, so that a recorded step finds each of them.
            into = batch if module.device.type == "cuda" else None
            batch = cache.minibatch(rows, progress < module.method.drop_until, into)
            yield batch
