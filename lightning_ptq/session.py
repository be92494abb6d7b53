"""Where a calibration stands: caches at the current unit, reports of the finished ones, clocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ptq.allocation import allocate, apply, choices
from lightning_ptq.cache import UnitCache
from lightning_ptq.calibration import RANGE_IMAGES, UnitReport, estimate_ranges, finish_unit, judged_errors
from lightning_ptq.config import QuantConfig
from lightning_ptq.divergence import divergences
from lightning_ptq.equalize import equalize
from lightning_ptq.errors import PTQError
from lightning_ptq.fingerprint import data_digest, refuse
from lightning_ptq.graph import Chain, LayerPlan
from lightning_ptq.graph.arithmetic import counts_of
from lightning_ptq.importance import channel_importance
from lightning_ptq.memory import CachePolicy, CacheSizes, Room, unit_shapes
from lightning_ptq.methods import Weighting
from lightning_ptq.metrics import classes, has_scores
from lightning_ptq.network import NetworkCache, NetworkStart, finish_network, put_back, worse_than_nearest
from lightning_ptq.quantizers import weight_quantizers
from lightning_ptq.record import Curves, seen_by
from lightning_ptq.sensitivity import BITS
from lightning_ptq.settling import Settling
from lightning_ptq.store import CacheType, Store, run_chunked

# Fewer images than these, of all processes, judge by chance.
_LEAST_HELD_OUT = 16
CLOCKS = ("ranges", "calibration", "validation", "total")


@dataclass(frozen=True)
class World:
    """This process among all that calibrate together.

    Attributes:
        device: where it computes.
        size: number of processes.
        gather: tensor -> that tensor of every process, stacked (size, ...).
    """

    device: torch.device
    size: int
    gather: Callable[[Tensor], Tensor]

    def mean(self, x: Tensor) -> Tensor:
        """Average of `x` over all processes."""
        return self.gather(x).mean(0)


@dataclass(frozen=True)
class Images:
    """What a calibration reads, and how.

    Attributes:
        open: loads this process's calibration images (N, C, H, W), those that judge among them.
        read: images -> what the network reads of them.
        batch_size: images of each step.
        policy: where activations are kept. budget: bytes that they may take in memory. dtype: what they are rounded to.
        folder: for those on disk. say: is told how large they become.
        config: how ranges are estimated from the images. weighting: how channels are weighted.
        network: whether the last epoch is that of the whole network, behind those of the units.
        drawn: steps are made of so many of the images, the first; the others judge what was learned.
        round_again: whether that epoch trains the weights' rounding. correction: steps of PD-Quant's correction.
        layers: the student's, for mixed precision. learned: whether rounding is learned.
        allow_drift: go on from a checkpoint of other images.
    """

    open: Callable[[], Tensor]
    read: Callable[[Tensor], Tensor]
    batch_size: int
    policy: CachePolicy
    config: QuantConfig
    weighting: Weighting
    network: bool
    drawn: int
    round_again: bool
    correction: int
    layers: tuple[LayerPlan, ...] = ()
    learned: bool = True
    allow_drift: bool = False
    budget: int | None = None
    dtype: CacheType = "float32"
    folder: Path = Path()
    say: Callable[[str], object] = str


class Session:
    """One calibration of `student` against `teacher`, from its start or from a checkpoint's `state()`."""

    def __init__(self, teacher: Chain, student: Chain, settle: float = 0.0) -> None:
        self.teacher, self.student, self.settling = teacher, student, Settling(settle)
        self.reports: list[UnitReport] = []
        self.wall_seconds = dict.fromkeys(CLOCKS, 0.0)
        self.image_digest: int | None = None
        self.image_count: int | None = None  # that are drawn, over all processes
        self.judge_count: int | None = None  # that are held out
        self.calibration_agreement: float | None = None  # percent, on the images that steps drew, once all is done
        self.cache: UnitCache | NetworkCache | None = None
        self.importance: list[Tensor] | None = None  # of every unit's channels; None: they count alike
        self.bits: dict[str, dict[str, int]] | None = None  # mixed precision, by name; None: as configured
        # For the report: loss terms at the logging interval, and what each activation quantizer was shown.
        self.curves: Curves = {}
        self.seen: dict[str, dict[str, Any]] = {}
        self._network_start: NetworkStart | None = None
        # Kept for the network's epoch and the judgement at the end: a loader may not give them twice.
        self._images: Tensor | None = None
        self._last = 0
        self._store: Store | None = None
        self._world: World | None = None
        # Output of the unit that was finished last: judging computes it, and advancing needs it.
        self._student_out: Tensor | None = None
        self._unit_clock: float | None = None
        self._carried_seconds = 0.0
        self._held_out = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, in primitives."""
        running = 0.0 if self._unit_clock is None else time.monotonic() - self._unit_clock
        return {
            "images": self.image_digest,
            "counts": [self.image_count, self.judge_count],
            "reports": [report.to_dict() for report in self.reports],
            "wall_seconds": dict(self.wall_seconds),
            "unit_seconds": running,
            "calibration_agreement": self.calibration_agreement,
            "bits": self.bits,
            "curves": deepcopy(self.curves),
            "seen": self.seen,
            "network_start": None if self._network_start is None else self._network_start.to_dict(),
            "settling": self.settling.to_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Stand where a `state()` was taken; the caches are replayed when a unit is entered."""
        self.image_digest = state["images"]
        self.image_count, self.judge_count = state.get("counts", (None, None))  # an older checkpoint has none
        self.reports = [UnitReport(**report) for report in state["reports"]]
        self.calibration_agreement = state["calibration_agreement"]
        # An older checkpoint has none of these.
        self.curves, self.seen = deepcopy(state.get("curves", {})), state.get("seen", {})
        self.settling = Settling(self.settling.tolerance, **state.get("settling", {}))
        if state["bits"] is not None:
            self.use_bits(state["bits"])
        self.wall_seconds, self._carried_seconds = dict(state["wall_seconds"]), state["unit_seconds"]
        start = state["network_start"]
        self._network_start = None if start is None else NetworkStart(**start)

    def enter(self, unit: int, data: Images, world: World) -> None:
        """Advance the caches to `unit`: from a fresh start, from the unit before, or from any checkpoint.

        Unit len(student) is the whole network.
        """
        self._unit_clock, self._carried_seconds = time.monotonic() - self._carried_seconds, 0.0
        self._world, self._last = world, len(self.student) - 1 + data.network
        # The way to the network leads through the head, also where a fit is resumed behind it: its cache holds the
        # teacher's side, and a checkpoint may have been written before the head was judged.
        self._enter_unit(min(unit, len(self.student) - 1), data, world)
        if unit == len(self.student):
            self.finish(unit - 1)
            self._enter_network(data, world)
        self.settling.enter(
            unit
        )  # not before: what was judged on the way was settled, or not, by what a checkpoint says

    def _enter_unit(self, unit: int, data: Images, world: World) -> None:
        if self.cache is None:
            opened = time.monotonic()
            self.cache = self._open(data, world)
            assert self._unit_clock is not None
            self._unit_clock += time.monotonic() - opened
        cache = self.cache
        assert isinstance(cache, UnitCache)
        while cache.unit < unit:
            self.finish(cache.unit)
            out, self._student_out = self._student_out, None
            cache.advance(cache.student_out() if out is None else out)

    def _enter_network(self, data: Images, world: World) -> None:
        head, out = self.cache, self._student_out
        assert isinstance(head, UnitCache)
        if out is None and self._network_start is None:
            out = head.student_out()
        teacher_out, features, drawn = head.teacher_in, head.features, head.drawn
        self.cache = self._student_out = head = None  # what only the units need goes first
        images, store = self._checked_images(data, world)
        self.cache = NetworkCache(self.student, images, teacher_out, features, store, drawn, data.round_again)
        if self._network_start is None:
            assert out is not None
            self._network_start = NetworkStart.of(self.cache, out, world.mean)

    def progress(self, step: int, steps: int) -> float:
        """Share of its schedules that the epoch in progress has done; looks at a unit's error where that is due."""
        if self.settling.looks(step, steps) and isinstance(self.cache, UnitCache):
            assert self._world is not None
            errors = judged_errors(self.cache, self.importance_of(self.cache.unit))
            self.settling.look(float(self._world.mean(errors.mean())), step, steps)
        return self.settling.progress(step, steps)

    def finish(self, unit: int) -> UnitReport | None:
        """Judge the unit whose steps are done; its report, or None if it was judged before."""
        if self.cache is None or len(self.reports) != unit:
            return None
        assert self._world is not None
        assert self._unit_clock is not None
        mean = self._world.mean
        if isinstance(self.cache, NetworkCache):
            assert self._network_start is not None
            report, out = finish_network(self.cache, self._network_start, mean, self._world.size)
            self._network_start = None
        else:
            report, out = finish_unit(self.cache, self.importance_of(unit), mean, self._world.size)
            self._student_out = out
        self.reports.append(report)
        if unit == self._last:
            out = self._judge_all(out)
        seconds = time.monotonic() - self._unit_clock
        self.reports[-1] = replace(self.reports[-1], seconds=seconds, settled_after=self.settling.since)
        if unit >= len(self.student) - 1:  # the output is the network's
            drawn, cache = slice(self.cache.drawn), self.cache
            if has_scores(out) and not self.student.is_part:
                agreed = (classes(out[drawn]) == classes(cache.features[drawn])).float().mean()
                self.calibration_agreement = 100.0 * float(mean(agreed))
        self.wall_seconds["calibration"] += seconds
        self._unit_clock = time.monotonic()
        return self.reports[-1]

    def _judge_all(self, out: Tensor) -> Tensor:
        """Put the whole network back if it does worse than it started; its output (N, ...), which was `out`."""
        cache, images, world = self.cache, self._images, self._world
        assert cache is not None
        assert images is not None
        assert world is not None
        if not worse_than_nearest(cache, images, out, world.mean, world.size):
            return out
        importance = [self.importance_of(unit) for unit in range(len(self.student))]
        judged = images[cache.judged]
        self.reports = put_back(self.teacher, self.student, judged, importance, self.reports, world.device, world.mean)
        return run_chunked(self.student, images, world.device, cache.store)

    @property
    def images(self) -> Tensor:
        """This process's calibration images, those that no step draws last."""
        assert self._images is not None
        return self._images

    @property
    def opened(self) -> UnitCache | NetworkCache:
        """The caches of what is calibrated now."""
        assert self.cache is not None
        return self.cache

    def importance_of(self, unit: int) -> Tensor | None:
        """Weights of the channels of a unit's output (C,); None where all count alike."""
        return None if self.importance is None else self.importance[unit]

    def close(self) -> None:
        """Drop the caches."""
        self.cache = self._student_out = self._images = self._store = self._unit_clock = None

    def _checked_images(self, data: Images, world: World) -> tuple[Tensor, Store]:
        """The images, and where they and the caches lie."""
        if self._images is not None and self._store is not None:
            return self._images, self._store
        images = data.open()
        drawn = min(len(images), data.drawn)
        counts = world.gather(torch.tensor([[drawn, len(images) - drawn]])).reshape(-1, 2)
        check_batch(int(counts[:, 0].min()), data.batch_size, world.size)
        # The same number everywhere: processes with and without images that judge would judge differently.
        self._held_out = held_out_of(int(counts[:, 1].min()), world.size)
        images = images[: drawn + self._held_out]  # what is too little to judge is not learned from either
        shares = world.gather(torch.tensor([data_digest(images)])).flatten().tolist()
        digest = sum(place * share for place, share in enumerate(shares, 1)) % 2**62
        if self.image_digest not in (None, digest):
            refuse(
                "the checkpoint was calibrated on other images, or on these in another order. Give the same data, "
                "calibration_samples and seed",
                data.allow_drift,
            )
        self.image_digest = digest
        self.judge_count = self._held_out * world.size
        self.image_count = int(counts[:, 0].sum())
        images = self.teacher.laid_out(data.read(images), world.device)
        shapes = unit_shapes(self.teacher, tuple(images.shape[1:]))
        sizes = CacheSizes.of(self.teacher, shapes, len(images), data.dtype, data.correction > 0)
        room = Room(world.device, data.budget, data.folder, world.size)
        tier = room.choose(data.policy, sizes)
        data.say(room.text(sizes, tier))
        self._store = Store(world.device, tier, data.folder, data.dtype)
        self._images = self._store.put(images)
        return self._images, self._store

    def _open(self, data: Images, world: World) -> UnitCache:
        """Check the images, estimate ranges if there are none yet, weigh channels, and cache the first unit."""
        images, store = self._checked_images(data, world)
        held_out = self._held_out
        share = min(-(-RANGE_IMAGES // world.size), len(images) - held_out)
        if not all(q.enabled for q in weight_quantizers(self.student)):
            start = time.monotonic()
            equalize(self.student, images[:share], data.config, world.device, world.gather)
            # By all images that steps draw: with fewer, chance has its say about which tensors get the bits.
            self._choose_bits(images[: len(images) - held_out], data, world)
            shown = estimate_ranges(self.student, images[:share], data.config, world.device, world.gather)
            self.seen = seen_by(self.student, shown)
            self.wall_seconds["ranges"] += time.monotonic() - start
        if data.weighting == "fisher":
            self.importance = channel_importance(self.teacher, images[:share], world.device, world.gather)
        return UnitCache(self.teacher, self.student, images, store, held_out, data.correction)

    def _choose_bits(self, images: Tensor, data: Images, world: World) -> None:
        """Mixed precision, if it is asked for: decided once, before there are ranges."""
        average = data.config.average_bits
        if average is None:
            if data.config.budget != "bops":
                data.say(f"quant.budget={data.config.budget!r} bounds nothing without average_bits")
            return
        among = choices(data.layers, data.config.budget)
        data.say(f"mixed precision: {len(among)} tensors are tried at {', '.join(map(str, BITS))} bits, one at a time")
        teacher, student, gather, device = self.teacher, self.student, world.gather, world.device
        lost = divergences(
            teacher, student, images, data.config, device, gather, data.learned, among, self._store, data.say
        )
        counts = counts_of(student, tuple(images.shape[1:]))
        chosen = allocate(data.layers, lost, counts, average, data.config.budget)
        self.use_bits({"weights": chosen.weights, "activations": chosen.activations})

    def use_bits(self, bits: dict[str, dict[str, int]]) -> None:
        """Give layers ("weights") and quantizers ("activations") the bits that were chosen for them."""
        self.bits = bits
        apply(self.student, bits["weights"], bits["activations"])


def held_out_of(further: int, world_size: int) -> int:
    """How many images each process holds out where the one with the fewest has so many `further` ones."""
    return further if further * world_size >= _LEAST_HELD_OUT else 0


def check_batch(images: int, batch_size: int, world_size: int) -> None:
    """Raise `PTQError` if a process has fewer images than a batch needs."""
    if images < batch_size:
        raise PTQError(
            f"batch_size={batch_size} needs that many different images, but there {'is' if images == 1 else 'are'} "
            f"{images} calibration image{'s' * (images != 1)}"
            + (f" on each of {world_size} processes" if world_size > 1 else "")
            + ". Add images (data.calibration_samples) or lower model.batch_size."
        )
