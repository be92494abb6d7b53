"""Which terms the objective of a unit has, and that of the whole network."""

from __future__ import annotations

from lightning_ptq.losses.base import Objective, Term
from lightning_ptq.losses.contrastive import Contrastive, ContrastiveConfig
from lightning_ptq.losses.prediction import Prediction, PredictionDifference
from lightning_ptq.losses.reconstruction import Reconstruction, RelativeReconstruction
from lightning_ptq.losses.rounding import RoundingRegularizer
from lightning_ptq.methods import Method


def unit_objective(
    method: Method,
    rounding_weight: float | None,
    critic: ContrastiveConfig | None,
    further: dict[str, Term],
    units: int,
) -> Objective:
    """What each of `units` units minimises: the terms of the method, of the critic if there is one, and `further`."""
    terms: dict[str, Term] = {"reconstruction": Reconstruction()}
    if method.rounding == "adaround":
        terms["rounding"] = RoundingRegularizer(rounding_weight)
    if method.prediction:
        terms["prediction"] = PredictionDifference(method.prediction)
    if critic is not None:
        terms["contrastive"] = Contrastive(critic)
    return Objective(terms | further, units)


def network_objective(features: float, critic: ContrastiveConfig | None) -> Objective:
    """What the last epoch minimises; `features` is the weight of the reconstruction of the head's input."""
    terms: dict[str, Term] = {"prediction": Prediction()}
    if features:
        terms["features"] = RelativeReconstruction(features)
    if critic is not None:
        terms["contrastive"] = Contrastive(critic)
    return Objective(terms, 1)
