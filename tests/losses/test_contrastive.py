"""The contrastive term: what it compares with what, and what holds whatever the settings."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lightning_ptq.losses import Contrastive, ContrastiveConfig, Tail, UnitBatch
from lightning_ptq.losses.base import channels_first
from lightning_ptq.losses.contrastive import ContrastiveLoss
from lightning_ptq.losses.critic import at_positions, cosine, find_negatives, projected
from lightning_ptq.losses.infonce import infonce_loss
from tests.losses.helpers import unit_batch

torch.manual_seed(0)


def term(**settings: Any) -> Contrastive:
    """Of whole images, as the paper has it, where nothing else is said."""
    paper: dict[str, Any] = {"loss": "infonce", "feature": "tail", "collisions": "argmax"}
    return Contrastive(ContrastiveConfig(**(paper | settings)))


@pytest.mark.parametrize("similarity", ["cosine", "gaussian"])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("loss", get_args(ContrastiveLoss))
def test_invariant_and_lowest_for_a_perfect_student(loss: Any, two_sided: bool, similarity: Any) -> None:
    contrastive = term(loss=loss, two_sided=two_sided, similarity=similarity)
    generator = torch.Generator().manual_seed(0)
    perfect, noisy = [], []
    for _ in range(100):
        teacher, noise = torch.randn(2, 16, 10, generator=generator).unbind(0)
        student = teacher + 0.5 * noise
        order = torch.randperm(16, generator=generator)
        noisy.append(contrastive(unit_batch(student, teacher)))
        torch.testing.assert_close(contrastive(unit_batch(student[order], teacher[order])), noisy[-1])
        perfect.append(contrastive(unit_batch(teacher, teacher)))
    assert sum(perfect) < sum(noisy)
    # The others also reward noise that takes a student away from its negatives: they are lower only on average.
    if loss == "infonce" or (loss == "dcl" and similarity == "cosine"):
        assert all(a < b for a, b in zip(perfect, noisy, strict=True))


@pytest.mark.parametrize("similarity", ["cosine", "gaussian"])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("loss", get_args(ContrastiveLoss))
def test_stays_finite(loss: Any, two_sided: bool, similarity: Any) -> None:
    same_class = torch.ones(4, 3) * torch.tensor([3.0, 1.0, 0.0])
    opposite = torch.eye(4, 3) - torch.eye(4, 3).roll(1, 0)
    cases = [(s, same_class) for s in (torch.zeros(4, 3), same_class, same_class * 1e6)]
    for student, teacher in [*cases, (-opposite, opposite), (opposite.roll(1, 0), opposite)]:
        student = student.clone().requires_grad_()
        contrastive = term(loss=loss, temperature=0.01, two_sided=two_sided, similarity=similarity)
        value = contrastive(unit_batch(student, teacher))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


def test_the_gradient_of_dcl_stays_where_that_of_infonce_vanishes() -> None:
    teacher = torch.eye(6)
    gradients = {}
    for loss in ("infonce", "dcl"):
        student = (teacher + 1e-3 * torch.arange(36.0).view(6, 6)).requires_grad_()
        term(loss=loss, temperature=0.05)(unit_batch(student, teacher)).backward()
        gradients[loss] = float(student.grad.norm())
    assert gradients["dcl"] > 100 * gradients["infonce"]


class Setting:
    """Twelve images behind a unit whose tail has three units, the last of which is the head."""

    def __init__(self) -> None:
        torch.manual_seed(4)  # some of the images that are compared are of one class
        self.tail_units = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Sequential(nn.Flatten(), nn.Linear(20, 6))]
        self.teacher_out = torch.randn(12, 3, 2, 2)
        self.student_all = self.teacher_out + 0.3 * torch.randn(12, 3, 2, 2)
        self.tail = Tail(self.run, 3)
        self.features = self.run(self.teacher_out, 3).detach()

    def run(self, x: torch.Tensor, units: int) -> torch.Tensor:
        for unit in self.tail_units[:units]:
            x = unit(x)
        return x

    def batch(self, rows: torch.Tensor) -> UnitBatch:
        return unit_batch(
            self.student_all[rows],
            self.teacher_out[rows],
            rows=rows,
            tail=self.tail,
            teacher_side=SimpleNamespace(teacher_out=self.teacher_out, features=self.features),
        )


@pytest.mark.parametrize("negatives", ["batch", "bank"])
@pytest.mark.parametrize(
    ("settings", "units"),
    [
        ({"feature": "tail"}, 3),
        ({"feature": "tail-features"}, 2),
        ({"feature": "tail", "tail_units": 1}, 1),
        ({"feature": "tail-features", "tail_units": 9}, 2),
        ({"feature": "output"}, 0),
        ({"feature": "projection"}, None),
        ({"feature": "output", "center": True}, 0),
        ({"feature": "tail", "two_sided": True}, 3),
        ({"feature": "tail", "images": 2}, 3),
        ({"feature": "tail", "images": 2, "two_sided": True}, 3),
    ],
)
def test_what_is_compared_with_what(settings: dict[str, Any], units: int | None, negatives: Any) -> None:
    setting, rows = Setting(), torch.tensor([5, 0, 9, 2])

    def features(x: torch.Tensor) -> torch.Tensor:
        if units is None:
            return projected(x)
        x = setting.run(x, units)
        return x if x.dim() == 2 else x.mean((2, 3))

    teacher, student = features(setting.teacher_out), features(setting.student_all)
    if settings.get("center"):
        student, teacher = student - teacher.mean(0), teacher - teacher.mean(0)
    columns = rows if negatives == "batch" else torch.arange(12)
    used = rows[: settings.get("images")]
    same = setting.features[used].argmax(1)[:, None] == setting.features[columns].argmax(1)
    mask = (used[:, None] != columns) & ~same
    assert mask.any()
    assert (mask != (used[:, None] != columns)).any(), "some images collide"
    logits = cosine(student[used], teacher, 0.1)
    expected = infonce_loss(logits[torch.arange(len(used)), used], logits[:, columns], mask)
    if settings.get("two_sided"):
        back = cosine(teacher[used], student[used], 0.1)
        classes = setting.features[used].argmax(1)
        expected = (expected + infonce_loss(back.diagonal(), back, classes[:, None] != classes)) / 2
    value = term(**settings, negatives=negatives)(setting.batch(rows))
    torch.testing.assert_close(value, expected)


def test_the_teacher_s_side_is_computed_once_for_each_unit() -> None:
    setting, contrastive = Setting(), term(feature="tail-features")
    calls: list[int] = []
    tail = Tail(lambda x, n: calls.append(len(x)) or setting.run(x, n), 3)  # type: ignore[func-returns-value]
    for rows in (torch.arange(4), torch.arange(4, 8)):
        batch = setting.batch(rows)
        batch.tail = tail
        batch.teacher_side = SimpleNamespace(teacher_out=setting.teacher_out, features=setting.features)
        contrastive(batch)
    assert calls == [12, 4, 4]  # all images of the teacher, then each batch's student
    other = Setting()
    other.teacher_out = other.teacher_out + 1.0
    contrastive(other.batch(torch.arange(4)))
    assert len(contrastive._bank.features) == 12
    torch.testing.assert_close(contrastive._bank.features, other.run(other.teacher_out, 2).mean((2, 3)))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"two_sided": True, "similarity": "gaussian", "collisions": "keep"},
    {"negatives": "bank", "feature": "output", "center": True},
    {"negatives": "bank", "two_sided": True, "collisions": "similarity"},
    {"feature": "positions", "two_sided": True},
]


def value_and_gradient(settings: dict[str, Any], first: int, stop: int, rows: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradient of a student that is one matrix, for a process that holds images `first` to `stop`."""
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(14, 6, generator=generator)
    weight = (torch.eye(6) + 0.3 * torch.randn(6, 6, generator=generator)).requires_grad_()
    mine = teacher[first:stop]
    side = SimpleNamespace(teacher_out=mine, features=mine)
    loss = term(**settings)(unit_batch(mine[rows] @ weight, mine[rows], rows=rows, teacher_side=side))
    (gradient,) = torch.autograd.grad(loss, weight)
    return [loss.detach(), gradient]


def one_of_two(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # Shards of different size: 8 and 6 images; the batches are images 1, 5, 2 and 9, 8, 13.
    share = [(0, 8, torch.tensor([1, 5, 2])), (8, 14, torch.tensor([1, 0, 5]))][rank]
    means = []
    for settings in SETTINGS:
        parts = value_and_gradient(settings, *share)
        for part in parts:
            dist.all_reduce(part)
        means.append([part / 2 for part in parts])  # DDP's average
    torch.save(means, f"{out}{rank}")
    dist.destroy_process_group()


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_processes_equal_one_with_both_batches(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "store"), str(tmp_path / "out"))
    mp.start_processes(one_of_two, arguments, nprocs=2, start_method="fork")
    for rank in range(2):
        for settings, (loss, gradient) in zip(SETTINGS, torch.load(tmp_path / f"out{rank}"), strict=True):
            expected = value_and_gradient(settings, 0, 14, torch.tensor([1, 5, 2, 9, 8, 13]))
            torch.testing.assert_close(loss, expected[0], msg=str(settings))
            torch.testing.assert_close(gradient, expected[1], msg=str(settings))


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("collisions", ["keep", "argmax"])
def test_positions_are_rows_of_their_own(collisions: Any, two_sided: bool) -> None:
    setting, rows = Setting(), torch.tensor([5, 0, 9, 2])
    batch = setting.batch(rows)
    batch.teacher_features = setting.features[rows]
    value = term(feature="positions", positions=99, collisions=collisions, two_sided=two_sided)(batch)
    losses = []
    for student, teacher in ((setting.student_all, setting.teacher_out), (setting.teacher_out, setting.student_all)):
        for i in rows:
            for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                query, total, own = student[i, :, y, x], 0.0, 0.0
                for j in rows:
                    for v, u in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        key = teacher[j, :, v, u]
                        similarity = (query @ key / query.norm() / key.norm() / 0.1).exp()
                        own = similarity if (i, y, x) == (j, v, u) else own
                        same = setting.features[i].argmax() == setting.features[j].argmax()
                        if (i, y, x) == (j, v, u) or collisions == "keep" or not same:
                            total = total + similarity
                losses.append(-(own / total).log())
    count = 16
    expected = torch.stack(losses if two_sided else losses[:count]).mean()
    torch.testing.assert_close(value, expected)


def test_positions_are_drawn_anew_at_each_step_and_the_same_for_teacher_and_student() -> None:
    setting = Setting()
    batch = setting.batch(torch.arange(12))
    batch.student_out = setting.teacher_out.clone()
    contrastive = term(feature="positions", positions=8, collisions="keep", temperature=0.01)
    values = []
    for seed in range(3):
        batch.generator = torch.Generator().manual_seed(seed)
        values.append(float(contrastive(batch)))
    assert len(set(values)) == 3
    assert max(values) < 1.0, "of 8 positions each is most like itself"


@pytest.mark.parametrize("negatives", ["batch", "bank"])
def test_behind_the_whole_tail_changed_images_are_compared_with_the_teacher_s_outputs(negatives: Any) -> None:
    """In the last epoch the tail is the student's."""
    setting, rows = Setting(), torch.tensor([5, 0, 9, 2])
    batch = setting.batch(rows)
    batch.changed = True
    outputs = batch.teacher_features = torch.randn(4, 6)
    value = term(feature="tail", negatives=negatives, collisions="keep")(batch)
    teacher, place = outputs, torch.arange(4)
    if negatives == "bank":
        teacher, place = setting.features.clone(), rows
        teacher[rows] = outputs
    logits = cosine(setting.run(setting.student_all[rows], 3), teacher, 0.1)
    mask = place[:, None] != torch.arange(len(teacher))
    torch.testing.assert_close(value, infonce_loss(logits[torch.arange(4), place], logits, mask))


def test_tokens_are_positions() -> None:
    tokens = channels_first(torch.randn(2, 5, 3), -1)  # (B, C, L)
    assert torch.equal(at_positions(tokens), at_positions(tokens[..., None]))
    assert torch.equal(at_positions(tokens)[7], tokens[1, :, 2])


@pytest.mark.parametrize("negatives", ["batch", "bank"])
def test_images_that_were_changed_are_compared_with_what_the_teacher_makes_of_them(negatives: Any) -> None:
    setting, rows = Setting(), torch.tensor([5, 0, 9, 2])
    changed = setting.teacher_out[rows].flip(3) + 0.5 * torch.randn(4, 3, 2, 2)
    outputs = setting.run(changed, 3).detach()
    batch = setting.batch(rows)
    batch.changed, batch.teacher_out, batch.teacher_features = True, changed, outputs
    value = term(feature="projection", negatives=negatives)(batch)
    student, own = projected(setting.student_all[rows]), projected(changed)
    teacher, classes = own, outputs.argmax(1)
    place = torch.arange(4)
    if negatives == "bank":
        teacher, classes, place = projected(setting.teacher_out), setting.features.argmax(1), rows
        teacher[rows], classes[rows] = own, outputs.argmax(1)
    logits = cosine(student, teacher, 0.1)
    mask = classes[place][:, None] != classes
    torch.testing.assert_close(value, infonce_loss(logits[torch.arange(4), place], logits, mask))


def test_dense_outputs_are_pooled_over_positions() -> None:
    teacher = torch.randn(4, 5, 3, 3)
    flat = teacher.mean((2, 3))
    torch.testing.assert_close(term()(unit_batch(teacher, teacher)), term()(unit_batch(flat, flat)))


def test_the_mask_of_the_default_needs_no_labels() -> None:
    outputs = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    mask = find_negatives(torch.arange(3), outputs, outputs)
    assert mask.tolist() == [[False, False, True], [False, False, True], [True, True, False]]
