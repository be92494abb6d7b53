"""How teacher, round-to-nearest and calibrated student are compared: validation, test and prediction."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ptq.errors import PTQError
from lightning_ptq.graph import Chain
from lightning_ptq.metrics import MEASURES, NO_LABEL, classes, has_classes
from lightning_ptq.quantizers import initial_ranges, weight_quantizers


class Evaluation(L.LightningModule):
    """The part of a `PTQModule` that looks at both networks and changes neither."""

    def __init__(self, teacher: Chain, student: Chain) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student
        self.rates = nn.ModuleDict({name: measure() for name, measure in MEASURES.items()})

    def forward(self, x: Tensor) -> Tensor:
        """The student's output for images (N, C, H, W)."""
        return self.student(x)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Evaluation:
        """Both networks stay in eval mode: live dropout or batch statistics would be calibrated into the result."""
        super().train(mode)
        self.teacher.eval()
        self.student.eval()
        return self

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Teacher, round-to-nearest and student on one batch of images, with or without labels."""
        images, labels = _images_and_labels(batch)
        images = self.teacher.laid_out(images, images.device)
        outputs = {"teacher": self.teacher(images)}
        teacher = outputs["teacher"]
        if labels is not None and teacher.dim() > 2:
            labels = pixel_labels(labels, teacher)
        if labels is not None and has_classes(teacher) and labels.shape == teacher.select(1, 0).shape:
            counted = labels[labels != NO_LABEL] if teacher.dim() > 2 else labels
            _check_labels(int(counted.max()) if len(counted) else 0, teacher.shape[1])
        if self.trainer.sanity_checking:
            return  # images and labels have passed; what Lightning measures here it throws away
        outputs["student"] = self.student(images)
        with initial_ranges(self.student):
            outputs["nearest"] = self.student(images)
        for name, output in outputs.items():
            if labels is not None:
                self._measure_labels(name, output, labels)
            if name != "teacher":
                self._measure(f"{name}_sqnr_db", output, teacher)
                if has_classes(output):
                    self._measure(f"{name}_agreement", classes(output), classes(teacher))

    def _measure_labels(self, name: str, output: Tensor, labels: Tensor) -> None:
        """Compare an output with labels of images, or of pixels."""
        if not has_classes(output) or labels.shape != (predicted := classes(output)).shape:
            return
        if output.dim() > 2:
            self._measure(f"{name}_miou", output, labels)
            predicted, labels = (x[labels != NO_LABEL] for x in (predicted, labels))
        self._measure(f"{name}_top1", predicted, labels)

    def on_test_start(self) -> None:
        """Refuse to pass the float network off as the quantized one."""
        self._check_ranges()

    def on_predict_start(self) -> None:
        """Refuse to pass the float network off as the quantized one."""
        self._check_ranges()

    def _check_ranges(self) -> None:
        """A quantizer without ranges passes floats through; in a fit that is a sanity check, elsewhere an error."""
        if self.trainer.state.fn != "fit" and not all(q.enabled for q in weight_quantizers(self.student)):
            raise PTQError("the quantizers have no ranges yet: run fit first, or give ckpt_path, a fit's checkpoint.")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same as `validation_step`."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The student's output for one batch of images."""
        return self(_images_and_labels(batch)[0])  # type: ignore[no-any-return]

    def _measure(self, name: str, result: Tensor, reference: Tensor) -> None:
        metric = self.rates[name]
        assert isinstance(metric, Metric)
        metric.update(result, reference)
        self.log(name, metric, on_step=False, on_epoch=True, batch_size=len(result))


def pixel_labels(labels: Tensor, output: Tensor) -> Tensor:
    """Labels (N, ...) of an output (N, C, ...); a dimension of one channel goes, and negative ones are `NO_LABEL`."""
    if labels.dim() == output.dim() and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    labels = labels.long()
    return labels.where(labels >= 0, NO_LABEL)


def _check_labels(largest: int, outputs: int) -> None:
    if largest >= outputs:
        raise PTQError(
            f"a validation image has label {largest}, but the model's {outputs} outputs stand for labels up to "
            f"{outputs - 1}. Class folders are numbered in alphabetical order: give one for each output."
        )


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and, if there are any, labels of a validation batch."""
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return batch[0], batch[1] if len(batch) > 1 and isinstance(batch[1], Tensor) else None
    return batch, None
