"""How close a student is to its teacher: agreement, signal-to-noise ratio, mutual information."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_ptq.losses.critic import cosine, directions, projected

# Label of a pixel that has none, as Pascal VOC and torchvision have it.
NO_LABEL = 255


def signal_and_noise(student: Tensor, teacher: Tensor) -> Tensor:
    """(2,) float64: sums of t^2 and of (s - t)^2."""
    parts = (teacher.float().square(), (student.float() - teacher.float()).square())
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])


def decibels(signal: float, noise: float) -> float:
    """Signal to noise ratio 10 log10(signal / noise); inf without noise, -inf with noise alone."""
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0 else -math.inf


def mi_lower_bound(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> float:
    """InfoNCE lower bound of the mutual information of paired rows, in nats, at most log N (van den Oord et al. 2018).

    The critic is the cosine similarity over `temperature` of rows centred on the teacher's mean. Shapes: both (N, D).
    """
    mean = teacher.float().mean(0)
    logits = cosine(student.float() - mean, teacher.float() - mean, temperature)
    loss = (logits.logsumexp(1) - logits.diagonal()).mean()
    return math.log(len(logits)) - float(loss)


def gaussian_mi(student: Tensor, teacher: Tensor) -> float:
    """Mutual information of paired rows in nats as if they were jointly Gaussian; nan for too few rows, inf if equal.

    1/2 log(det Sx det Sy / det Sxy) of the sample covariances, whose bias under that assumption is known and taken off
    (the logarithm of a Wishart determinant has a mean in digamma functions). Not capped at log N as InfoNCE is, but no
    bound where the rows are not Gaussian. Shapes: both (N, D) with N > 2 D + 1.
    """
    n, d = student.shape
    if n <= 2 * d + 1:
        return math.nan
    both = torch.cat([student, teacher], 1).double()
    both = both - both.mean(0)
    # A dimension that never changes says nothing; unit variance for the others, for the determinants' sake.
    both = both / both.std(0).clamp(min=torch.finfo(torch.float32).tiny)
    covariance = both.T @ both / (n - 1)
    parts = (covariance[:d, :d], covariance[d:, d:], covariance)
    x, y, xy = (_log_det(part) - _log_det_bias(n - 1, len(part)) for part in parts)
    return 0.5 * (x + y - xy)


def _log_det(matrix: Tensor) -> float:
    return float(torch.linalg.slogdet(matrix).logabsdet)


def _log_det_bias(freedom: int, size: int) -> float:
    """E log det S - log det Sigma for a sample covariance of that size with so many degrees of freedom."""
    halves = (freedom - torch.arange(size, dtype=torch.float64)) / 2
    return float(torch.digamma(halves).sum()) + size * math.log(2.0 / freedom)


def alignment(student: Tensor, teacher: Tensor) -> float:
    """Mean squared distance of paired rows on the unit sphere, in [0, 4] (Wang and Isola 2020). Shapes: both (N, D)."""
    return float((directions(student) - directions(teacher)).square().sum(1).mean())


def uniformity(rows: Tensor) -> float:
    """log of the mean of exp(-2 |a - b|^2) over pairs of rows on the unit sphere, in [-8, 0]: low where they are spread
    out (Wang and Isola 2020). nan for a single row. Shape: (N, D)."""
    squares = torch.pdist(directions(rows)).square()
    return float(squares.mul(-2.0).exp().mean().log()) if len(squares) else math.nan


class Information(Metric):
    """What of a unit's activations its quantization leaves: estimates of their mutual information, and geometry.

    Rows are fixed random projections of the activations (`critic.projected`), which can only lose information: a lower
    bound of theirs is one of the activations'. `gaussian_mi` looks at the first few numbers of a row only, since it
    needs many times as many rows as numbers. Rows of all processes are put together.
    """

    full_state_update = False
    GAUSSIAN = 8
    student: list[Tensor]
    teacher: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.width = self.GAUSSIAN
        self.add_state("student", [], dist_reduce_fx="cat")
        self.add_state("teacher", [], dist_reduce_fx="cat")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add activations of the same images, both (B, C, ...)."""
        self.width = min(self.GAUSSIAN, student[0].numel())
        self.student.append(projected(student.float()))
        self.teacher.append(projected(teacher.float()))

    def compute(self) -> dict[str, float]:
        """`mi_lower_bound_nats`, `mi_gaussian_nats`, `alignment`, and the student's `uniformity`."""
        student, teacher = dim_zero_cat(self.student), dim_zero_cat(self.teacher)
        few = slice(self.width)
        return {
            "mi_lower_bound_nats": mi_lower_bound(student, teacher),
            "mi_gaussian_nats": gaussian_mi(student[:, few], teacher[:, few]),
            "alignment": alignment(student - teacher.mean(0), teacher - teacher.mean(0)),
            "uniformity": uniformity(student - teacher.mean(0)),
        }


class MeanRate(Metric):
    """Percentage of predictions that equal a reference: labels (top-1) or the teacher's predictions (agreement)."""

    hits: Tensor
    total: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, reference: Tensor) -> None:
        """Add predicted classes and what they should be, any equal shape."""
        self.hits += (predictions == reference).sum()
        self.total += predictions.numel()

    def compute(self) -> Tensor:
        """Percent, shape ()."""
        return 100.0 * self.hits / self.total


class MeanIoU(Metric):
    """Intersection over union of predicted and labelled pixels in percent, mean over the classes that occur."""

    confusion: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        # As large as the network has classes, which the first update tells.
        self.add_state("confusion", torch.zeros(0, 0, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: Tensor, labels: Tensor) -> None:
        """Add the network's output (N, C, ...) and labels (N, ...); negative ones and `NO_LABEL` do not count."""
        count, labelled = output.shape[1], (labels >= 0) & (labels != NO_LABEL)
        if not len(self.confusion):
            self.confusion = self.confusion.new_zeros(count, count)
        pairs = labels[labelled] * count + classes(output)[labelled]
        self.confusion += torch.bincount(pairs.flatten(), minlength=count**2).view(count, count)

    def compute(self) -> Tensor:
        """Percent, shape ()."""
        both = self.confusion.diagonal()
        either = self.confusion.sum(0) + self.confusion.sum(1) - both
        return 100.0 * (both / either)[either > 0].mean()


class OutputSQNR(Metric):
    """Signal to quantization noise ratio of the network's output, whatever that stands for."""

    sums: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add outputs, any equal shape."""
        self.sums = self.sums + signal_and_noise(student, teacher).to(self.sums.dtype)

    def compute(self) -> Tensor:
        """Decibels, shape ()."""
        return torch.tensor(decibels(*self.sums.tolist()))


# What a validation measures: percent, and decibels.
MEASURES: dict[str, type[Metric]] = {
    "teacher_top1": MeanRate,
    "nearest_top1": MeanRate,
    "student_top1": MeanRate,
    "nearest_agreement": MeanRate,
    "student_agreement": MeanRate,
    "teacher_miou": MeanIoU,
    "nearest_miou": MeanIoU,
    "student_miou": MeanIoU,
    "nearest_sqnr_db": OutputSQNR,
    "student_sqnr_db": OutputSQNR,
}


def has_scores(output: Tensor) -> bool:
    """Whether an output (N, C, ...) can be scores of classes: a single number for each position can't."""
    return output.dim() >= 2 and output.shape[1] > 1


def classes(output: Tensor) -> Tensor:
    """Predicted class of every position: (N, C, ...) -> (N, ...)."""
    return output.argmax(1)
