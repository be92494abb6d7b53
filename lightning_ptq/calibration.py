"""The steps around a unit's optimisation that are not optimisation: ranges before, judgement and report after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lightning_ptq.cache import UnitCache
from lightning_ptq.config import QuantConfig
from lightning_ptq.errors import DEVICE_ERRORS, PTQError
from lightning_ptq.graph.units import Chain
from lightning_ptq.layers import quantized_layers
from lightning_ptq.losses.base import channels_first
from lightning_ptq.losses.reconstruction import squared_errors
from lightning_ptq.metrics import Information, decibels, signal_and_noise
from lightning_ptq.quantizers import ActQuantizer, act_quantizers, float_mode, initial_ranges, scales_are_finite
from lightning_ptq.ranges import Histogram, weight_qparams
from lightning_ptq.store import chunks
from lightning_ptq.weights import WeightQuantizer

# Images that ranges are estimated from, as in QDrop's code.
RANGE_IMAGES = 256
# What the mean error of the usual images may grow by where that of all falls.
_USUAL_GROWTH = 1.05
# A growth of errors is chance up to so many of its standard errors: a handful of images makes most of it.
CHANCE = 2.0

Gather = Callable[[Tensor], Iterable[Tensor]]


def alone(x: Tensor) -> Tensor:
    """`Gather` for one process: `x`, stacked (1, ...)."""
    return x[None]


@dataclass(frozen=True)
class UnitReport:
    """What calibration did to one unit, on the images that judge it: those held out, if any.

    `mse` is the reconstruction loss, before calibration and of the unit as it is left: where calibration was not
    accepted, both are the same. For the whole network (`network.py`), it is that of the final output, before and after
    the last epoch. The next five are of its output against the teacher's (`metrics.py`). `settled_after` is the share
    of its steps behind which the rest was cut short, if it was (`settling.py`).
    """

    name: str
    mse_before: float
    mse_after: float
    sqnr_db: float
    mi_lower_bound_nats: float
    mi_gaussian_nats: float
    alignment: float
    uniformity: float
    flipped_fraction: float
    accepted: bool
    seconds: float = 0.0  # of steps and judgement, which the session measures
    settled_after: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain values only."""
        return asdict(self)


def estimate_ranges(
    student: Chain, images: Tensor, config: QuantConfig, device: torch.device, gather: Gather
) -> dict[ActQuantizer, Histogram]:
    """Give every quantizer of `student` its starting range.

    Weights are searched on their own values; activations in one pass of the float network over `images` (N, C, H, W).

    Args:
        gather: tensor -> that tensor of every process, so that all processes get the same ranges.

    Returns:
        What each activation quantizer was shown.

    Raises:
        PTQError: NaN or infinite weights or activations, naming the layer or unit, or images the network can't take.
    """
    for name, layer in (pair for unit in student.units for pair in quantized_layers(unit)):
        w = layer.weight_quantizer
        try:
            w.set_range(layer.weight, *weight_range(layer.weight, w, config))
        except PTQError as error:
            raise PTQError(f"layer {name!r}: {error}. Check the model's weights.") from None
    seen = observe(student, images, device, gather)
    for q, histogram in seen.items():
        q.start(histogram, config.act_range)
    return seen


def weight_range(weight: Tensor, quantizer: WeightQuantizer, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Scale and zero point of `weight` at its quantizer's bits."""
    q = quantizer
    return weight_qparams(weight, config.weight_range, q.bits, q.symmetric, q.per_channel)


def observe(student: Chain, images: Tensor, device: torch.device, gather: Gather) -> dict[ActQuantizer, Histogram]:
    """What every activation quantizer of `student` reads in the float network, over `images` of all processes.

    Raises:
        PTQError: NaN or infinite activations, naming the unit, or images the network can't take.
    """
    quantizers = act_quantizers(student)
    histograms = {q: Histogram() for q in quantizers}
    watch(student, {q: histogram.update for q, histogram in histograms.items()}, images, device)
    states = torch.stack([histograms[q].state() for q in quantizers]).to(device)  # (Q, 4 + bins)
    merged = {q: Histogram() for q in quantizers}
    for process in gather(states):
        for histogram, state in zip(merged.values(), process, strict=True):
            histogram.merge(Histogram.from_state(state))
    return merged


def watch(
    student: Chain, watchers: Mapping[ActQuantizer, Callable[[Tensor], object]], images: Tensor, device: torch.device
) -> None:
    """Run the float network over `images` in batches; every quantizer's watcher is given what the quantizer reads.

    Raises:
        PTQError: what a watcher raises, naming the unit, or images the network can't take.
    """

    def show(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(quantizer, ActQuantizer)
        watchers[quantizer](args[0])

    hooks = [quantizer.register_forward_pre_hook(show) for quantizer in watchers]
    try:
        with float_mode(student), torch.no_grad():
            for x in chunks(images):
                x = x.to(device)
                for name, unit in zip(student.names, student.units, strict=True):
                    x = _run_unit(unit, x, name)
    finally:
        for hook in hooks:
            hook.remove()


def _run_unit(unit: nn.Module, x: Tensor, name: str) -> Tensor:
    try:
        return unit(x)  # type: ignore[no-any-return]
    except PTQError as error:
        raise PTQError(
            f"unit {name!r}: the float network gives {error}. Check the calibration images and the model's weights."
        ) from None
    except DEVICE_ERRORS:
        raise
    except (RuntimeError, AssertionError) as error:
        raise PTQError(
            f"unit {name!r} can't take an input of shape {tuple(x.shape)}: {error}. "
            "Check the calibration images' size and channels (data.resize, data.crop)."
        ) from error


def judged_errors(cache: UnitCache, importance: Tensor | None) -> Tensor:
    """Reconstruction errors (N,) of the cache's unit, as quantized now, for the images that judge it."""
    target = cache.teacher_out[cache.judged]
    dim = cache.student.channel_dim(cache.unit, target.shape)
    return Comparison(cache.device, dim, importance).over(cache.student_out(cache.judged), target).errors


def finish_unit(
    cache: UnitCache, importance: Tensor | None, mean: Callable[[Tensor], Tensor], processes: int = 1
) -> tuple[UnitReport, Tensor]:
    """Judge the cache's unit, roll it back where calibration did harm, and say what happened.

    Args:
        importance: weights of the output's channels in the reconstruction loss.
        mean: averages a tensor over processes, so that all of them decide alike. processes: how many there are.

    Returns:
        (report, the unit's final output for all cached images).
    """
    unit, name = cache.student.units[cache.unit], cache.student.names[cache.unit]
    rows = cache.judged
    target = cache.teacher_out[rows]
    dim = cache.student.channel_dim(cache.unit, target.shape)
    with initial_ranges(unit):
        before = judged_errors(cache, importance)
    out = cache.student_out()
    found = Comparison(cache.device, dim, importance).over(out[rows], target)
    errors = [float(mean(x.mean())) for x in (before, found.errors)]
    accepted = no_worse(found.errors, before, mean, processes) and scales_are_finite(unit)
    if not accepted:
        restore_initial(unit)
        del out  # before there is another
        out = cache.student_out()
        found, errors[1] = Comparison(cache.device, dim, importance).over(out[rows], target), errors[0]
    return report(name, unit, found, (errors[0], errors[1]), accepted, mean), out


def no_worse(
    after: Tensor,
    before: Tensor,
    mean: Callable[[Tensor], Tensor],
    processes: int = 1,
    usual_growth: float = _USUAL_GROWTH,
) -> bool:
    """Whether the errors (N,) of images did not grow: neither their mean, nor clearly that of the smaller half of them.

    The mean alone is what a few extreme images make of it, which may get better where all others get worse. In a good
    unit the half may grow by some percent while the mean falls, and by more than that where it is a dozen images: it is
    clear if it is more than `CHANCE` standard errors too. NaN is worse, and an error that overflows says nothing.

    Args:
        processes: how many of them `mean` averages over.
    """
    size = after + before  # of both: which half it is favours neither
    usual = size <= size.median()
    growth = (after - before)[usual]
    numbers = after.mean(), before.mean(), after[usual].mean(), before[usual].mean(), growth.mean()
    new, old, new_half, old_half, average, square, count = mean(
        torch.stack([*numbers, growth.square().mean(), usual.sum().to(growth.dtype)])
    ).double()
    half = (new_half <= old_half * usual_growth) | is_chance(average, square, count * processes)
    return bool(new.isfinite() & new_half.isfinite() & (new <= old) & half)


def is_chance(average: Tensor, square: Tensor, count: Tensor | int) -> Tensor:
    """Whether a growth whose mean over `count` images is `average`, and that of its square `square`, may be chance.

    All () and float64; not where it is NaN or overflows.
    """
    error = ((square - average.square()).clamp(min=0.0) / count).sqrt()
    return square.isfinite() & (average <= CHANCE * error)


class Comparison:
    """A unit's output against the teacher's, as reports have it; a few images at a time, since both are large.

    Args:
        device: where to compute.
        dim: which dimension is that of channels. importance: their weights in `errors`.
    """

    def __init__(self, device: torch.device, dim: int = 1, importance: Tensor | None = None) -> None:
        self.device, self.dim, self.importance = device, dim, importance
        self.information, self._errors = Information(), list[Tensor]()
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def over(self, out: Tensor, target: Tensor) -> Comparison:
        """This comparison, of all images (N, ...)."""
        for some in zip(chunks(out), chunks(target), strict=True):
            self.update(*some)
        return self

    def update(self, out: Tensor, target: Tensor) -> None:
        """Add the outputs for the same images, both (B, ...)."""
        out, target = (channels_first(x.to(self.device), self.dim).float() for x in (out, target))
        self._errors.append(squared_errors(out, target, self.importance))
        self.sums += signal_and_noise(out, target)
        self.information.update(out, target)

    @property
    def errors(self) -> Tensor:
        """`squared_errors` of all images so far (N,)."""
        return torch.cat(self._errors)


def report(
    name: str,
    unit: nn.Module,
    found: Comparison,
    errors: tuple[float, float],
    accepted: bool,
    mean: Callable[[Tensor], Tensor],
) -> UnitReport:
    """The report on `unit`, of which so much was `found`; `errors` are before and after."""
    signal, noise = mean(found.sums).tolist()
    weights = sum(layer.weight.numel() for _, layer in quantized_layers(unit))
    flipped = sum(layer.weight_quantizer.flipped(layer.weight) for _, layer in quantized_layers(unit))
    return UnitReport(
        name=name,
        mse_before=errors[0],
        mse_after=errors[1],
        sqnr_db=decibels(signal, noise),
        **found.information.compute(),
        flipped_fraction=flipped / max(weights, 1),
        accepted=accepted,
    )


def restore_initial(unit: nn.Module) -> None:
    """Put every quantizer of `unit` back to initial scales and rounding to nearest."""
    for act in act_quantizers(unit):
        act.log_scale.data.copy_(act.initial_log_scale)
    for _, layer in quantized_layers(unit):
        layer.weight_quantizer.reset(layer.weight)
