"""Features, similarities and negatives against loops."""

import pytest
import torch

from lightning_ptq.losses.critic import PROJECTED, cosine, find_negatives, gaussian, pooled, projected

torch.manual_seed(0)


def test_cosine_is_torch_s_for_every_pair() -> None:
    student, teacher = torch.randn(3, 5), torch.randn(4, 5)
    expected = [[float(torch.cosine_similarity(s, t, dim=0)) / 0.2 for t in teacher] for s in student]
    torch.testing.assert_close(cosine(student, teacher, 0.2), torch.tensor(expected))


def test_gaussian_is_the_squared_distance_of_every_pair() -> None:
    # Far from the origin, where expanded squares would cancel.
    student, teacher = torch.randn(3, 5) + 1000.0, torch.randn(4, 5) + 1000.0
    expected = [[-float((s - t).square().sum()) / (2 * 0.2 * 3.0) for t in teacher] for s in student]
    value = gaussian(student, teacher, 0.2, torch.tensor(3.0).sqrt())
    torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-3, atol=1e-3)


def test_gaussian_stays_finite_where_all_images_look_alike() -> None:
    same = torch.ones(3, 5)
    assert gaussian(same, same, 0.01, torch.tensor(0.0)).isfinite().all()


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 3, 2)])
def test_pooled_averages_positions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(pooled(x), x.reshape(4, 6, -1).mean(2))


@pytest.mark.parametrize("shape", [(6, 900), (6, 40, 25), (6, 20, 9, 7), (6, 8, 2, 2)])
def test_projection_is_fixed_linear_and_keeps_distances(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = projected(x)
    assert y.shape == (6, PROJECTED)
    assert torch.equal(y, projected(x))
    torch.testing.assert_close(projected(2 * x), 2 * y)
    if x.dim() == 2:  # nothing is averaged first
        ratio = torch.pdist(y) / torch.pdist(x)
        assert float(ratio.min()) > 0.8
        assert float(ratio.max()) < 1.2


@pytest.mark.parametrize("collisions", ["argmax", "similarity", "keep"])
def test_negatives_are_other_images_that_do_not_collide(collisions: str) -> None:
    teacher, outputs, own = torch.randn(12, 5), torch.randn(12, 3), torch.tensor([7, 0, 3])
    found = find_negatives(own, teacher, outputs, collisions, 0.25)  # type: ignore[arg-type]
    centred = teacher - teacher.mean(0)
    for row, i in enumerate(own.tolist()):
        cosines = torch.cosine_similarity(centred[i], centred, dim=1)
        near = sorted((j for j in range(12) if j != i), key=lambda j: -float(cosines[j]))
        for j in range(12):
            expected = {
                "keep": True,
                "argmax": int(outputs[i].argmax()) != int(outputs[j].argmax()),
                "similarity": j not in near[:3],  # a quarter of the eleven others
            }[collisions]
            assert bool(found[row, j]) == (expected and j != i), (collisions, i, j)
