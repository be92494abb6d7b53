"""The train loader of a calibration: its epochs are units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lightning_ptq.cache import Minibatch, Order

if TYPE_CHECKING:
    from lightning_ptq.module import PTQModule


class Minibatches:
    """The minibatches of some steps, one after another as they are asked for, maybe in the same memory."""

    def __init__(self, steps: range, of: Callable[[int], Minibatch]) -> None:
        self.steps, self._of = steps, of

    def __iter__(self) -> Iterator[Minibatch]:
        return map(self._of, self.steps)


class UnitLoader:
    """Minibatches of the current unit's caches, a pure function of (seed, unit, step, rank).

    The body of `__iter__` is the only code that runs exactly once for each real epoch on every way to resume, so a
    unit is entered there. The position is the Trainer's: the loader has no state of its own.
    """

    def __init__(self, module: PTQModule) -> None:
        self.module = module

    def __len__(self) -> int:
        """Lightning's batches in the current epoch."""
        return self.module.batches_of(self.module.trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it tells Lightning that resuming in the middle works."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def __iter__(self) -> Iterator[Minibatch | Minibatches]:
        module, trainer = self.module, self.module.trainer
        unit, each = trainer.current_epoch, module.steps_per_batch
        first = (trainer.fit_loop.batch_idx + 1) * each
        module.enter_unit(unit, first)
        cache, settling, steps = module.session.opened, module.session.settling, module.steps_taken()
        seed = module.seed, unit, module.global_rank
        order = Order(cache.drawn, module.batch_size, *seed, device=module.device)
        last: Minibatch | None = None

        def minibatch(step: int) -> Minibatch:
            nonlocal last
            progress = settling.progress(step, steps)
            if last is None or progress < 1.0:  # else nothing will be done with it
                # Where the input is no longer mixed with the teacher's, a corrected target would be that of another
                # input.
                into = last if module.reuses_memory else None
                last = cache.minibatch(order.rows(step), progress < module.method.drop_until, into)
            return last

        total = module.steps_of(unit)
        for start in range(first, total, each):
            some = range(start, min(start + each, total))
            yield Minibatches(some, minibatch) if each > 1 else minibatch(start)
