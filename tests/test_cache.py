"""Caches against running the whole chain anew."""

import pytest
import torch

from lightning_ptq import PTQError
from lightning_ptq.cache import UnitCache
from lightning_ptq.calibration import estimate_ranges, finish_unit
from lightning_ptq.quantizers import act_quantizers, initial_ranges
from lightning_ptq.seeds import mixed_seed
from lightning_ptq.session import Images, Session, World
from lightning_ptq.store import Store, is_channels_last, run_chunked
from tests.helpers import tiny_images, tiny_module

CPU = torch.device("cpu")


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_cache_is_what_the_chain_gives(channels_last: bool) -> None:
    module, images = tiny_module(), tiny_images(70)  # more than one chunk, and a rest
    images = module.teacher.laid_out(images, CPU) if channels_last else images
    estimate_ranges(module.student, images, module.quant, CPU, lambda t: t[None])
    cache = UnitCache(module.teacher, module.student, images, Store(CPU))
    with torch.no_grad():
        for unit in range(len(module.student)):
            torch.testing.assert_close(cache.teacher_in, module.teacher(images, stop=unit))
            torch.testing.assert_close(cache.student_in, module.student(images, stop=unit))
            torch.testing.assert_close(cache.teacher_out, module.teacher(images, stop=unit + 1))
            torch.testing.assert_close(cache.features, module.teacher(images))
            rows = torch.tensor([3, 69, 0])
            batch = cache.minibatch((rows, rows))
            assert torch.equal(batch.student_in, cache.student_in[rows])
            assert torch.equal(batch.teacher_out, cache.teacher_out[rows])
            for x in (cache.student_in, cache.teacher_in, batch.student_in, batch.teacher_in):
                assert is_channels_last(x) == channels_last
            if unit + 1 < len(module.student):
                cache.advance(cache.student_out())


def test_held_out_images_judge_a_unit() -> None:
    """A unit that is perfect on the images that steps draw, and worse than its start on the others, is rolled back."""
    module, images = tiny_module(), tiny_images(40)
    estimate_ranges(module.student, images, module.quant, CPU, lambda t: t[None])
    unit = module.student.units[0]
    for held_out in (0, 4):
        cache = UnitCache(module.teacher, module.student, images, Store(CPU), held_out=held_out)
        assert cache.drawn == 40 - held_out
        for q in act_quantizers(unit):
            q.log_scale.data.copy_(q.initial_log_scale + 0.5)
        with torch.no_grad():
            learned = unit(images)
            with initial_ranges(unit):
                cache.teacher_out = torch.cat([learned[:36], unit(images)[36:]])
        report, out = finish_unit(cache, None, lambda x: x)
        assert report.accepted == (held_out == 0)
        assert len(out) == 40


@pytest.mark.parametrize(
    ("drawn", "processes", "held_out"),
    [(24, 1, 16), (25, 1, 0), (24, 2, 15), (33, 2, 0), (33, 3, 6)],
    ids=["enough", "too few", "two processes", "too few on two", "three processes"],
)
def test_processes_hold_out_equally_many(drawn: int, processes: int, held_out: int) -> None:
    """This one has 40 images, others less; 16 of all together are enough to judge by. What is left goes unused."""

    def gather(x: torch.Tensor) -> torch.Tensor:
        counts = x.shape == (1, 2)  # (drawn, further)
        return torch.stack([x - torch.tensor([0, 1]) if counts and k else x for k in range(processes)])

    module = tiny_module()
    session = Session(module.teacher, module.student)
    images = Images(lambda: tiny_images(40), lambda x: x, 8, "auto", module.quant, "equal", False, drawn, False, 0)
    session.enter(0, images, World(CPU, processes, gather))
    assert (session.opened.drawn, len(session.images)) == (drawn, drawn + held_out)
    assert (session.image_count, session.judge_count) == (drawn * processes, held_out * processes)


def test_gradients_flow_through_cached_activations() -> None:
    out = run_chunked(lambda x: x * 2, tiny_images(5), CPU)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (out * weight).sum().backward()
    assert weight.grad is not None


def test_activations_that_are_not_finite_name_their_unit() -> None:
    module = tiny_module()
    module.teacher.units[2].get_submodule("blocks.1.conv1").bias.data[0] = float("inf")
    with pytest.raises(PTQError, match=r"unit 'blocks\.1': the float network gives NaN or infinite values"):
        estimate_ranges(module.student, tiny_images(), module.quant, CPU, lambda t: t[None])
    with pytest.raises(PTQError, match="gives NaN or infinite activations"):
        UnitCache(module.teacher, module.student, tiny_images(), Store(CPU))


def test_seeds_that_are_near_give_unrelated_streams() -> None:
    seeds = {mixed_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert mixed_seed(1, 2) != mixed_seed(2, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
