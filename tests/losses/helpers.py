"""A unit's minibatch made from two tensors."""

from types import SimpleNamespace
from typing import Any

import torch

from lightning_ptq.losses import Tail, UnitBatch


def unit_batch(student: torch.Tensor, teacher: torch.Tensor, step: int = 0, **changes: Any) -> UnitBatch:
    """The batch of all images, in their order, of a unit with nothing behind it."""
    values: dict[str, Any] = {"student_out": student, "teacher_out": teacher, "teacher_features": teacher}
    values |= {"rows": torch.arange(len(student)), "tail": Tail(lambda x, n: x, 0)}
    values |= {"teacher_side": SimpleNamespace(teacher_out=teacher, features=teacher)}
    values |= {"student_unit": torch.nn.Identity(), "unit": 0, "step": step, "progress": 0.5}
    return UnitBatch(**(values | changes))
