"""Distribution correction, against the statistics of the batch norms that were folded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQError, PTQModule, QuantConfig
from lightning_ptq.cache import UnitCache
from lightning_ptq.distribution import _deviation, correct_distribution
from lightning_ptq.graph import ChainPair, build_chain
from lightning_ptq.graph.fold import statistics_of
from lightning_ptq.store import Store
from tests.helpers import Block, TinyNet, tiny_images, tiny_net

CPU = torch.device("cpu")


def chains(net: TinyNet) -> ChainPair:
    return build_chain(net, QuantConfig(), "block")


def decided_net() -> TinyNet:
    """Batch norms with weights and biases that differ from 1 and 0."""
    net = tiny_net()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(-1.5, 1.5)
                module.bias.data.normal_()
    return net


def distance(block: Block, x: Tensor) -> Tensor:
    """Of each image, from the batch norms' own inputs and running statistics, in units of these; summed over layers."""
    y = block.conv1(x)
    z = block.conv2(torch.relu(block.bn1(y)))
    total = torch.zeros(len(x))
    for out, norm in ((y, block.bn1), (z, block.bn2)):
        deviation = norm.running_var.sqrt()
        mean = (out.mean((2, 3)) - norm.running_mean) / deviation
        ratio = out.std((2, 3)) / deviation - 1.0
        total += mean.square().sum(1) + ratio.square().sum(1)
    return total


def test_it_brings_every_image_closer_to_what_training_gave() -> None:
    net = decided_net()
    teacher, x = chains(net).teacher, torch.randn(40, 8, 8, 8, generator=torch.Generator().manual_seed(1)).relu()
    block = net.blocks[0]
    assert isinstance(block, Block)
    moved = correct_distribution(teacher.units[1], x, CPU, 50)
    with torch.no_grad():
        before, after = distance(block, x), distance(block, moved)
    assert bool((after < before).all())
    assert 0.0 < float((moved - x).abs().max()) <= 0.5 * float(x.std()) * 1.2
    # An image is corrected by itself, whatever stands beside it: the other way round another one is alone in its batch.
    x = torch.cat([x[:1] / 8, x[:32]])
    moved = correct_distribution(teacher.units[1], x, CPU, 50)
    torch.testing.assert_close(
        correct_distribution(teacher.units[1], x.flip(0), CPU, 50).flip(0), moved, atol=1e-3, rtol=1e-3
    )


def test_the_rate_follows_the_deviation_of_all_images_whatever_their_mean() -> None:
    x = 5.0 + 0.1 * torch.randn(70, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_deviation(x), x.std(correction=0), rtol=1e-4, atol=0)


def test_the_statistics_of_a_folded_layer_are_those_of_its_norm() -> None:
    net = decided_net()
    teacher = chains(net).teacher
    found = [statistics_of(m) for m in teacher.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [net.bn, *(norm for block in net.blocks for norm in (block.bn1, block.bn2))]  # type: ignore[union-attr]
    assert found[-1] is None, "nothing was folded into the head"
    for statistics, norm in zip(found[:-1], norms, strict=True):
        assert statistics is not None
        torch.testing.assert_close(statistics[0], norm.bias.detach())
        torch.testing.assert_close(statistics[1], norm.weight.detach().abs())


def test_what_has_no_norm_stays() -> None:
    teacher, x = chains(tiny_net()).teacher, tiny_images(4)
    assert correct_distribution(teacher.units[-1], x, CPU, 5) is x
    assert correct_distribution(nn.Conv2d(3, 3, 1), x, CPU, 5) is x
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    with pytest.raises(PTQError, match="distribution_steps needs a batch norm that was folded"):
        PTQModule(plain, method="pdquant", distribution_steps=5)


def test_a_unit_that_is_passed_through_is_not_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("lightning_ptq.cache.correct_distribution", lambda unit, x, *_: calls.append(len(x)) or x)
    pair, images = chains(tiny_net()), tiny_images(40)
    cache = UnitCache(pair.teacher, pair.student, images, Store(CPU), held_out=8, correction=4)
    cache.advance(cache.student_out())
    for _ in range(2):
        cache.minibatch((torch.arange(4),) * 2, True)
    assert calls == [32], "once, and only what is drawn"


def test_steps_are_shown_corrected_activations_and_the_next_unit_starts_from_the_true_ones() -> None:
    pair, images = chains(decided_net()), tiny_images(40)
    cache = UnitCache(pair.teacher, pair.student, images, Store(CPU), correction=4)
    plain = UnitCache(pair.teacher, pair.student, images, Store(CPU))
    for k in range(2):
        rows = (torch.tensor([3, 0, 17]),) * 2
        shown, true = cache.minibatch(rows, True), plain.minibatch(rows, True)
        assert torch.equal(cache.minibatch(rows).teacher_in, true.teacher_in)
        assert not torch.equal(shown.teacher_in, true.teacher_in)
        with torch.no_grad():
            torch.testing.assert_close(shown.teacher_out, pair.teacher.units[k](shown.teacher_in))
        assert torch.equal(shown.student_in, true.student_in)
        assert torch.equal(shown.features, true.features)
        for each in (cache, plain):
            each.advance(each.student_out())
        assert torch.equal(cache.teacher_in, plain.teacher_in)
        assert torch.equal(cache.teacher_out, plain.teacher_out)
