"""When a unit has learned enough: its remaining steps are cut short once its error has settled."""

from __future__ import annotations

from dataclasses import asdict, dataclass

# Share of a unit's steps behind which its error is looked at for the first time, and between two looks.
_FIRST, _EVERY = 0.2, 0.1
# Share of a unit's steps in which what is left of its schedules is gone through once it has settled.
_ENDING = 0.2


def share_taken(since: float | None) -> float:
    """Share of a unit's steps that did something, where it had settled behind the share `since` of them."""
    return 1.0 if since is None else min(1.0, since + _ENDING)


@dataclass
class Settling:
    """How far a unit's schedules have come, which is as far as its steps until its error has settled.

    Rounding is only decided in the end, so no unit can stop where it stands: once it has settled, the rest of its
    schedules takes a fifth of its steps, and those that are left then do nothing.

    Attributes:
        tolerance: share of the error by which it has to fall from one look to the next, or it has settled; 0 never
            looks.
        unit: the unit in progress. error: at the last look; None before the first.
        since: share of its steps behind which it had settled; None: it has not.
    """

    tolerance: float
    unit: int = -1
    error: float | None = None
    since: float | None = None

    def enter(self, unit: int) -> None:
        """Begin with a unit, unless it is the one in progress, that a checkpoint goes on with."""
        if unit != self.unit:
            self.unit, self.error, self.since = unit, None, None

    def looks(self, step: int, steps: int) -> bool:
        """Whether the error is to be looked at before `step` of `steps`."""
        first, every = max(1, round(_FIRST * steps)), max(1, round(_EVERY * steps))
        # Behind the last look that could still shorten anything there is none.
        due = first <= step < (1.0 - _ENDING) * steps and (step - first) % every == 0
        return self.tolerance > 0 and self.since is None and due

    def look(self, error: float, step: int, steps: int) -> None:
        """Take note of the error before `step` of `steps`; NaN settles nothing."""
        if self.error is not None and error > self.error * (1.0 - self.tolerance):
            self.since = step / steps
        self.error = error

    def progress(self, step: int, steps: int) -> float:
        """Share of its schedules that the unit has behind it at `step` of `steps`; 1 where nothing is left to do."""
        done = step / steps
        if self.since is None:
            return done
        return min(1.0, self.since + (done - self.since) / _ENDING * (1.0 - self.since))

    def to_dict(self) -> dict[str, object]:
        """Plain values, for a checkpoint."""
        return {key: value for key, value in asdict(self).items() if key != "tolerance"}
