"""How teacher, round-to-nearest and calibrated student are compared: validation, test and prediction."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ptq.datasets import class_names
from lightning_ptq.errors import DEVICE_ERRORS, PTQError
from lightning_ptq.functional import in_float32
from lightning_ptq.graph import Chain
from lightning_ptq.metrics import MEASURES, NO_LABEL, classes, has_scores
from lightning_ptq.quantizers import initial_ranges, weight_quantizers
from lightning_ptq.surroundings import Surroundings

T = TypeVar("T")


class Evaluation(L.LightningModule):
    """The part of a `PTQModule` that looks at both networks and changes neither."""

    def __init__(self, teacher: Chain, student: Chain, surroundings: Surroundings | None = None) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student
        # What a part's model is around it, in float; None where all of the model is quantized.
        self.surroundings = surroundings
        self._gives_tensor: bool | None = None
        self._told_classes = False
        # Of images that have classes: this process's, as the last validation found them, see `record.confusion`.
        self.class_pairs: dict[str, list[Tensor]] = {}
        self.class_count = 0
        self.rates = nn.ModuleDict({name: measure() for name, measure in MEASURES.items()})

    def forward(self, x: Any, *further: Any) -> Any:
        """The quantized model's output for images (N, C, H, W); of a part's model, whatever that takes and returns.

        Raises:
            PTQError: more than images, such as labels or a detector's targets, which only training needs; or some
                quantizers have no ranges yet, so that this would be the float network's output.
        """
        if further:
            raise PTQError(
                f"the quantized network reads images alone, and got {len(further)} more. Call module(images)."
            )
        self._check_ranges()
        return self.student(x) if self.surroundings is None else self.surroundings(x, self.student)

    def train(self, mode: bool = True) -> Evaluation:
        """All networks stay in eval mode: live dropout or batch statistics would be calibrated into the result."""
        super().train(mode)
        for network in (self.teacher, self.student, self.surroundings):
            if network is not None:
                network.eval()
        return self

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Teacher, round-to-nearest and student on one batch of images, with or without labels.

        In float32 whatever precision calibrates: what is exported computes so.
        """
        with in_float32(self.device):
            self._look_at(batch)

    def _look_at(self, batch: Any) -> None:
        images, labels = images_and_labels(batch)
        run, whole, teacher = _run_on(images, lambda: self._comparison(images))
        outputs = {"teacher": teacher}
        has_classes = whole and has_scores(teacher)
        labels = None if labels is None or not has_classes else class_labels(labels, teacher)
        if labels is not None:
            counted = labels[labels >= 0]
            _check_labels(int(counted.max()) if len(counted) else 0, teacher.shape[1])
            self._compare_classes(teacher.shape[1])
        if self.trainer.sanity_checking:
            return  # images and labels have passed; what Lightning measures here it throws away
        outputs["student"] = run(self.student)
        with initial_ranges(self.student):
            outputs["nearest"] = run(self.student)
        for name, output in outputs.items():
            if labels is not None:
                self._measure_labels(name, output, labels)
            if name != "teacher":
                self._measure(f"{name}_sqnr_db", output, teacher)
                if has_classes:
                    self._measure(f"{name}_agreement", classes(output), classes(teacher))
                if has_classes and teacher.dim() == 2:
                    self.class_count = teacher.shape[1]
                    pairs = classes(teacher) * self.class_count + classes(output)
                    self.class_pairs.setdefault(name, []).append(pairs)

    def _compare_classes(self, outputs: int) -> None:
        """Say once where the labels are of fewer classes than the network's: they may be of others."""
        trainer = self.trainer
        loader = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        names = class_names(loader or ())
        if names and len(names) < outputs and not self._told_classes:
            self._told_classes = True
            classes_there = f"{len(names)} class{'es' * (len(names) > 1)}"
            warnings.warn(
                f"validation images are of {classes_there}, and the network has {outputs} outputs: labels are "
                f"taken for the first {len(names)} of these. Where they are others, top-1 means nothing, and agreement "
                "with the teacher still does. Give one class folder for each output.",
                stacklevel=2,
            )

    def _comparison(self, images: Any) -> tuple[Callable[[Chain], Tensor], bool, Tensor]:
        """(chain -> what to compare of it on `images`, whether that is the model's own output and not a part's, and
        the teacher's).

        Where a part's model gives no tensor, such as detections, the part's output is compared.
        """
        around = self.surroundings
        if around is None:
            if not isinstance(images, Tensor):
                raise PTQError(
                    "validation images are a list, as a detector reads them; the network reads one tensor "
                    "(N, C, H, W). Give images of one size."
                )
            read = self.teacher.laid_out(images, images.device)
            return lambda chain: chain(read), True, self.teacher(read)
        if self._gives_tensor is None:
            self._gives_tensor = isinstance(around(images, self.teacher), Tensor)
        if self._gives_tensor:
            return lambda chain: around(images, chain), True, around(images, self.teacher)
        found = around.inputs(images)
        part = self.teacher.laid_out(found, found.device)
        return lambda chain: chain(part), False, self.teacher(part)

    def _measure_labels(self, name: str, output: Tensor, labels: Tensor) -> None:
        """Compare an output with labels of images, or of pixels."""
        if output.dim() > 2:
            self._measure(f"{name}_miou", output, labels)
        counted = labels >= 0
        self._measure(f"{name}_top1", classes(output)[counted], labels[counted])

    def on_validation_epoch_start(self) -> None:
        """What was found before says nothing about the network as it is now."""
        self.class_pairs = {}

    def on_test_epoch_start(self) -> None:
        """As in a validation."""
        self.on_validation_epoch_start()

    def on_test_start(self) -> None:
        """Refuse to pass the float network off as the quantized one."""
        self._check_ranges()

    def on_predict_start(self) -> None:
        """Refuse to pass the float network off as the quantized one."""
        self._check_ranges()

    def _check_ranges(self) -> None:
        """A quantizer without ranges passes floats through; in a fit that is a sanity check, elsewhere an error."""
        # A Trainer keeps `fn` behind a fit that failed.
        state = None if self._trainer is None else self._trainer.state
        fits = state is not None and (state.fn, state.status) == ("fit", TrainerStatus.RUNNING)
        if not fits and not all(q.enabled for q in weight_quantizers(self.student)):
            raise PTQError(
                "the quantizers have no ranges yet: run fit first, or give a fit's checkpoint (ckpt_path of Trainer, "
                "or PTQModule.load_from_checkpoint)."
            )

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same as `validation_step`."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The quantized model's output for one batch of images."""
        with in_float32(self.device):
            return self(images_and_labels(batch)[0])

    def _measure(self, name: str, result: Tensor, reference: Tensor) -> None:
        metric = self.rates[name]
        assert isinstance(metric, Metric)
        metric.update(result, reference)
        self.log(name, metric, on_step=False, on_epoch=True, batch_size=len(result))


def class_labels(labels: Tensor, output: Tensor) -> Tensor | None:
    """Labels (N, ...) of an output (N, C, ...), -1 where there is none; None, and a warning, if they are of other form.

    A dimension of one channel goes. None are negative labels, and those of pixels that are `NO_LABEL`.
    """
    if labels.dim() == output.dim() and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.shape != output.select(1, 0).shape:
        warnings.warn(
            f"labels of shape {tuple(labels.shape)} do not fit an output of shape {tuple(output.shape)}: top-1 is not "
            "measured. Give the number of one class for each image, or pixel.",
            stacklevel=2,
        )
        return None
    labels = labels.long()
    there = labels >= 0
    if output.dim() > 2:
        there &= labels != NO_LABEL
    return labels.where(there, -1)


def _run_on(images: Any, run: Callable[[], T]) -> T:
    """What `run` gives for validation images; raises `PTQError` for those that the network can't take."""
    each = [images] if isinstance(images, Tensor) else images
    if not isinstance(each, list | tuple) or not all(isinstance(image, Tensor) for image in each):
        raise PTQError(
            f"a validation batch begins with a {type(images).__name__}, where images are expected: a tensor "
            "(N, C, H, W), or a list of tensors for a detector. Have the loader give images, or images and labels."
        )
    for image in each:
        if not image.is_floating_point():
            raise PTQError(
                f"validation images are {str(image.dtype).removeprefix('torch.')}; the network reads floats. Convert "
                "and normalise them in the data set's transform, as those of calibration."
            )
    try:
        return run()
    except (PTQError, *DEVICE_ERRORS):
        raise
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        shape = tuple(images.shape) if isinstance(images, Tensor) else [tuple(image.shape) for image in images]
        raise PTQError(
            f"the network can't take validation images of shape {shape}: {error}. Give them the size and the channels "
            "of those of calibration."
        ) from error


def _check_labels(largest: int, outputs: int) -> None:
    if largest >= outputs:
        raise PTQError(
            f"a validation image has label {largest}, but the model's {outputs} outputs stand for labels up to "
            f"{outputs - 1}. Class folders are numbered in alphabetical order: give one for each output."
        )


def images_and_labels(batch: Any) -> tuple[Any, Tensor | None]:
    """Images and, if there are any, labels of a validation batch; images of different sizes are a list."""
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, list | tuple) and all(isinstance(image, Tensor) and image.dim() == 3 for image in batch):
        return list(batch), None
    if isinstance(batch, (tuple, list)):
        labels = batch[1] if len(batch) > 1 else None
        if isinstance(labels, tuple | list) and all(isinstance(label, str) for label in labels):
            warnings.warn("labels are text: top-1 is not measured. Give the number of each class.", stacklevel=2)
        return batch[0], labels if isinstance(labels, Tensor) else None
    return batch, None
