"""How a fit enters, judges and leaves each unit, and what it tells the session of data and processes."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_ptq.allocator import give_back_freed_memory
from lightning_ptq.bias import correct_biases, round_biases
from lightning_ptq.cache import UnitCache
from lightning_ptq.checks import run_folder
from lightning_ptq.graph import ChainPair
from lightning_ptq.memory import CachePolicy, CacheSizes, Room, unit_shapes
from lightning_ptq.resuming import Resuming
from lightning_ptq.selection import select
from lightning_ptq.session import Images, World
from lightning_ptq.settling import share_taken
from lightning_ptq.ties import steer_clear


class Entering(Resuming):
    """The part of a `PTQModule` that goes from unit to unit."""

    chains: ChainPair
    cache_policy: CachePolicy
    memory_budget: int | None
    cache_folder: str | None

    def enter_unit(self, unit: int, first_step: int = 0) -> None:
        """Make `unit` the one that is calibrated, from `first_step` on: caches advanced to it, only it is trained.

        Unit len(student) is the whole network.
        """
        self.forget_recordings()
        rank, size = self.global_rank, self.trainer.world_size
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        images = Images(
            open=lambda: data.calibration_images(rank, size, **({"further": self.judging} if self.judging else {})),
            read=self.checked,
            batch_size=self.batch_size,
            policy=self.cache_policy,
            config=self.quant,
            weighting=self.method.weighting,
            network=self.network_steps > 0,
            drawn=len(range(rank, data.calibration_samples, size)),
            allow_drift=self.allow_drift,
            round_again=self.network_rounding_lr > 0,
            correction=self.method.distribution_steps,
            budget=self.memory_budget,
            dtype=self.cache_dtype,
            folder=self.folder_of_caches(),
            say=rank_zero_info,
            layers=self.chains.layers,
            learned=self.method.rounding != "nearest",
        )
        self.session.enter(unit, images, World(self.device, size, self._all))
        self._select(unit, fresh=first_step == 0)
        if first_step == 0 and self.method.corrects_biases:
            assert isinstance(self.session.opened, UnitCache)
            correct_biases(self.session.opened, lambda x: self._all(x).mean(0))
        if first_step == 0:
            # Moments belong to one unit's steps; the network's epoch starts its own for the same scales.
            self.trainer.optimizers[0].state.clear()
        self.begin_recording(unit)
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            # DDP registers what requires grad when it wraps; without a new wrap the ranks diverge silently.
            strategy.model = strategy.lightning_module
            strategy.configure_ddp()

    @property
    def judging(self) -> float:
        """Share of the calibration images that are read in addition, to judge what was learned."""
        return self.held_out if self.method.learns else 0.0

    def folder_of_caches(self) -> Path:
        """Where caches lie that are on disk. A collective call: every process must make it."""
        return run_folder(self.trainer) if self.cache_folder is None else Path(self.cache_folder)

    def caches(self, shape: tuple[int, ...], samples: int, room: Room) -> str:
        """How large caches become, and where they would be kept, for images of `shape` that the network reads."""
        corrected = self.method.distribution_steps > 0
        sizes = CacheSizes.of(self.teacher, unit_shapes(self.teacher, shape), samples, self.cache_dtype, corrected)
        return room.text(sizes, room.choose(self.cache_policy, sizes))

    def checked(self, images: Tensor) -> Tensor:
        """What the quantized network reads of the calibration images, before anything long is done with them."""
        if self.surroundings is not None:
            images = self.surroundings.all_inputs(images)
        self.teacher.check_images(images)
        self.augment.check(images)
        return images

    def input_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what the quantized network reads when images have `image_shape` (C, H, W)."""
        return image_shape if self.surroundings is None else self.surroundings.shape_of(image_shape)

    def judge_last_unit(self) -> None:
        """Judge a unit that was not because the fit resumed behind its last step, where Lightning runs no loop."""
        done = self.trainer.current_epoch
        if len(self.session.reports) < done and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.to(self.trainer.strategy.root_device)  # which Lightning has taken it from by then
            self.enter_unit(done - 1, first_step=self.steps_of(done - 1))
            self._finish(done - 1)
            self.leave_units()
            self.cpu()

    def leave_units(self) -> None:
        """Train no unit any more and drop the caches."""
        self.session.close()
        self.forget_recordings()
        self.objective.forget()
        self.network_objective.forget()
        self._select(None)
        if self.device.type == "cpu":
            give_back_freed_memory()

    def _finish_if_done(self) -> None:
        """Judge the current unit unless it was stopped in the middle (max_steps, max_time)."""
        if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._finish(self.trainer.current_epoch)

    def _finish(self, unit: int) -> None:
        """Judge `unit` if it was not yet, and log what its report says."""
        self.forget_recordings()
        report = self.session.finish(unit)
        if report is None:
            return
        if unit == len(self.epoch_names) - 1:
            self._finish_biases()
        numbers = {k: v for k, v in report.to_dict().items() if isinstance(v, float)}
        steps = self.steps_taken() * share_taken(report.settled_after)
        images = steps * self.batch_size * self.trainer.world_size
        self._log(report.name, numbers | {"images_per_second": images / report.seconds})

    def _finish_biases(self) -> None:
        """What biases need to be computed alike wherever the network runs; once, when all else is done."""
        hardware = self.quant.placement == "hardware"
        round_biases(self.student, self.chains.layers, everywhere=hardware)
        if not hardware:
            steer_clear(self.student, self.session.images, self.device, lambda x: self._all(x).mean(0))

    def _select(self, unit: int | None, *, fresh: bool = True) -> None:
        """Train `unit`, the whole network if that is len(student), or nothing."""
        self.teacher.requires_grad_(False)
        self.zero_grad()
        again = self.network_rounding_lr > 0
        self._selection = select(self.student, unit, self.method, self._drop, round_again=again, fresh=fresh)

    def _all(self, x: Tensor) -> Tensor:
        """`x` of every process, stacked: (world, ...)."""
        x = x.to(self.device).contiguous()
        if self.trainer.world_size == 1:
            return x[None]
        # Not `self.all_gather`: in Lightning 2.6 it calls what torch deprecates, and no gradient is needed here.
        parts = [torch.empty_like(x) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(parts, x)
        return torch.stack(parts)
