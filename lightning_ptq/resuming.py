"""What a checkpoint holds beyond Lightning's own, and what has to be equal where it is loaded."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict
from typing import Any

from lightning.pytorch.trainer.states import TrainerStatus

from lightning_ptq.checkpoint import checked_checkpoint
from lightning_ptq.checks import check_steps_per_batch
from lightning_ptq.config import QuantConfig
from lightning_ptq.fingerprint import VERSION, check_architecture, check_same, check_version, refuse
from lightning_ptq.losses import ContrastiveConfig
from lightning_ptq.store import CacheType
from lightning_ptq.taking import Taking

# State that is the user's model, not the calibration's: in no checkpoint.
FROZEN = ("teacher.", "surroundings.")
# Settings that came later, with the value that an older checkpoint was made with.
_ADDED = {"settle": 0.0, "cache_dtype": "float32", "steps_per_batch": 1}
# What of the structure the method decides.
_BY_METHOD = ("granularity", "rounding")


class Resuming(Taking):
    """The part of a `PTQModule` that writes checkpoints and refuses those of other runs."""

    quant: QuantConfig
    critic: ContrastiveConfig
    contrastive: bool
    method_name: str
    model_name: str
    model_digest: str
    allow_drift: bool
    batch_size: int
    network_features: float
    rounding_weight: float | None
    cache_dtype: CacheType
    held_out: float
    settle: float
    _built: dict[str, Any]
    _began: float

    def stop_clock(self) -> None:
        """Add what has passed since the fit began, or since this was called, to the run's seconds."""
        now = time.monotonic()
        self.session.wall_seconds["total"] += now - self._began
        self._began = now

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave all that is frozen out; add what identifies the run and what is known of the finished units."""
        if self.trainer.state.fn == "fit" and self.trainer.state.status == TrainerStatus.RUNNING:
            self.stop_clock()
        epoch: Any = self.trainer.fit_loop.epoch_progress.current
        if 0 < epoch.ready == epoch.processed and not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            stand_in_unit(checkpoint, self.trainer.accumulate_grad_batches)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith(FROZEN)}
        checkpoint["lightning_ptq"] = {
            "version": VERSION,
            "model": self.model_digest,
            "model_name": self.model_name,
            "structure": self._structure(),
            "settings": self.settings(),
            "built": self._built,
            "session": self.session.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another run's checkpoint; give what is frozen back so that loading stays strict."""
        saved = checked_checkpoint(checkpoint)["lightning_ptq"]
        drift = self.allow_drift
        check_version(saved.get("version", VERSION), drift)
        if saved["model"] != self.model_digest:  # first: another model explains all that differs
            named = saved.get("model_name", "a network")  # an older checkpoint has no name
            check_architecture(checkpoint["state_dict"], self.state_dict(), named, self.model_name)
        theirs, mine, method = saved["structure"], self._structure(), saved["settings"]["method"]
        if method != self.method_name and any(theirs.get(key) != mine[key] for key in _BY_METHOD):
            theirs, mine = _by_name(theirs, method), _by_name(mine, self.method_name)
        check_same(theirs, mine, "quantization config", drift)
        if saved["model"] != self.model_digest:
            refuse(
                "the checkpoint belongs to a model with other weights. Give the weights that it was calibrated from",
                drift,
            )
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        if fits:
            whose = ""
            if self._asked_per_batch is None:
                self.steps_per_batch, whose = saved["settings"].get("steps_per_batch", 1), "the checkpoint's "
            check_same(_ADDED | saved["settings"], self.settings(), "calibration setting", drift)
            check_steps_per_batch(self.trainer, self.steps_per_batch, whose)
        else:  # weights of loss terms: they say nothing to who only uses the network, with whatever terms
            live = {key: value for key, value in self.state_dict().items() if key.endswith(".ratio_sums")}
            checkpoint["state_dict"].update(live)
        self.session.load_state(saved["session"])
        left = len(self.epoch_names) - len(self.session.reports)
        if left and not fits:
            warnings.warn(
                f"calibration is not finished: {left} of {len(self.epoch_names)} epochs are left, and what was not "
                "calibrated may do worse than rounding to nearest. Go on with fit and ckpt_path.",
                stacklevel=2,
            )
        checkpoint["state_dict"].update({k: v for k, v in self.state_dict().items() if k.startswith(FROZEN)})

    def _structure(self) -> dict[str, Any]:
        """Settings that decide which parameters there are and what they mean."""
        part = {} if self.surroundings is None else {"part": self.surroundings.part}
        return self.quant.to_dict() | {"granularity": self.method.granularity, "rounding": self.method.rounding} | part

    def settings(self) -> dict[str, Any]:
        """Settings, the Trainer's among them, that decide how calibration proceeds."""
        return {
            "processes": self.trainer.world_size,
            "precision": self.trainer.precision,
            "method": self.method_name,
            "input": self.method.input,
            "scales": self.method.scales,
            "drop": self.method.drop,
            "drop_until": self.method.drop_until,
            "weighting": self.method.weighting,
            "corrections": self.method.corrections,
            "prediction": self.method.prediction,
            "distribution_steps": self.method.distribution_steps,
            "contrastive": self.contrastive,
            "steps_per_unit": self.steps_per_unit,
            "network_steps": self.network_steps,
            "network_lr": self.network_lr,
            "network_rounding_lr": self.network_rounding_lr,
            "network_features": self.network_features,
            "augment": asdict(self.augment),
            "batch_size": self.batch_size,
            "held_out": self.held_out,
            "settle": self.settle,
            "rounding_lr": self.rounding_lr,
            "scale_lr": self.scale_lr,
            "rounding_weight": self.rounding_weight,
            "critic": asdict(self.critic),
            "cache_dtype": self.cache_dtype,
            "steps_per_batch": self.steps_per_batch,
            "seed": self.seed,
        }


def stand_in_unit(checkpoint: dict[str, Any], accumulated: int = 1) -> None:
    """Have a checkpoint go on with the unit that was stopped in its middle, as one does that is written behind a step.

    Lightning counts an epoch as done that `max_steps` or `max_time` ended: who resumed would skip the rest of the unit.

    Args:
        accumulated: batches of an optimisation step.
    """
    loop = checkpoint["loops"]["fit_loop"]
    for progress in loop["epoch_progress"].values():
        progress["processed"] = progress["completed"] = progress["ready"] - 1
    steps = loop["epoch_loop.batch_progress"]
    for progress in (steps["total"], steps["current"]):
        progress["completed"] = progress["ready"] - 1
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= steps["current"]["ready"] % accumulated == 0
    checkpoint["epoch"] = loop["epoch_progress"]["current"]["processed"]


def _by_name(structure: dict[str, Any], method: str) -> dict[str, Any]:
    """The same with the method's name, which is what a user gives, in place of what it decides."""
    return {key: value for key, value in structure.items() if key not in _BY_METHOD} | {"method": method}
