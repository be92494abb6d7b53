"""Loss terms of a reconstruction unit: one file each, summed by an `Objective`."""

from lightning_ptq.losses.base import Objective, Tail, Term, UnitBatch
from lightning_ptq.losses.contrastive import Contrastive, ContrastiveConfig
from lightning_ptq.losses.prediction import Prediction, PredictionDifference, prediction_loss
from lightning_ptq.losses.reconstruction import Reconstruction, reconstruction_loss
from lightning_ptq.losses.rounding import RoundingRegularizer

__all__ = [
    "Contrastive",
    "ContrastiveConfig",
    "Objective",
    "Prediction",
    "PredictionDifference",
    "Reconstruction",
    "RoundingRegularizer",
    "Tail",
    "Term",
    "UnitBatch",
    "prediction_loss",
    "reconstruction_loss",
]
