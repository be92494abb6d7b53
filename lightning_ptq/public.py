"""All that `import lightning_ptq` gives."""

from lightning_ptq.augment import Augmentation
from lightning_ptq.config import QuantConfig
from lightning_ptq.datamodule import CalibrationDataModule, CIFAR10Data, DigitsData, ImageFolderData
from lightning_ptq.errors import PTQError
from lightning_ptq.export import ParityReport, export_onnx, export_pt2, load_packed, lower_pt2, save_packed
from lightning_ptq.fingerprint import VERSION
from lightning_ptq.losses import ContrastiveConfig, Term, UnitBatch
from lightning_ptq.methods import Method
from lightning_ptq.module import PTQModule

__version__ = VERSION

__all__ = [
    "Augmentation",
    "CIFAR10Data",
    "CalibrationDataModule",
    "ContrastiveConfig",
    "DigitsData",
    "ImageFolderData",
    "Method",
    "PTQError",
    "PTQModule",
    "ParityReport",
    "QuantConfig",
    "Term",
    "UnitBatch",
    "export_onnx",
    "export_pt2",
    "load_packed",
    "lower_pt2",
    "save_packed",
]
