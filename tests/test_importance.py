"""Channel importance against the full Jacobian, one image and one output at a time."""

import pytest
import torch
import torchvision

from lightning_ptq import PTQModule
from lightning_ptq.config import QuantConfig
from lightning_ptq.graph import build_chain
from lightning_ptq.importance import channel_importance
from tests.helpers import tiny_images, tiny_net

CPU = torch.device("cpu")


def alone(x):
    return x[None]


def test_importance_is_the_diagonal_of_the_jacobian_s_square():
    teacher = build_chain(tiny_net(), QuantConfig(), "block").teacher
    images = tiny_images(1)
    # One image many times: the random signs average out to the exact sum over outputs.
    found = channel_importance(teacher, images.repeat(4096, 1, 1, 1), CPU, alone)
    for unit in range(len(teacher)):
        out = teacher(images, stop=unit + 1)
        jacobian = torch.autograd.functional.jacobian(lambda z, unit=unit: teacher(z, start=unit + 1)[0], out)
        exact = jacobian.square().sum(0)[0].flatten(1).sum(1) if out.dim() > 2 else jacobian.square().sum(0)[0]
        expected = (exact / exact.mean()).clamp(min=0.1)
        torch.testing.assert_close(found[unit], expected / expected.mean(), rtol=0.1, atol=0.02)
    assert torch.equal(found[-1], torch.ones(5))


def test_importance_of_several_processes_is_that_of_all_their_images():
    teacher = build_chain(tiny_net(), QuantConfig(), "block").teacher
    halves = []
    channel_importance(teacher, tiny_images(32), CPU, lambda x: halves.append(x) or x[None])
    both = channel_importance(teacher, tiny_images(32), CPU, lambda x: torch.stack([x, halves[0]]))
    for together, single in zip(both, channel_importance(teacher, tiny_images(32), CPU, alone), strict=True):
        torch.testing.assert_close(together, single)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "squeezenet1_1", "mobilenet_v3_small", "convnext_tiny"])
def test_it_works_where_activations_are_written_in_place(name):
    model = torchvision.models.get_model(name, weights=None).eval()
    chains = build_chain(model, QuantConfig(), "block")
    weights = channel_importance(chains.teacher, torch.randn(2, 3, 64, 64), CPU, alone)
    x = torch.randn(1, 3, 64, 64)
    for unit, weight in zip(chains.teacher.units, weights, strict=True):
        x = unit(x)
        assert weight.shape == (x.shape[1],)
        assert weight.mean() == pytest.approx(1.0, abs=1e-4)
        assert (weight > 0).all()


def test_a_dead_network_weighs_all_channels_alike():
    model = tiny_net()
    torch.nn.init.zeros_(model.fc.weight)
    teacher = build_chain(model, QuantConfig(), "block").teacher
    assert all(torch.equal(w, torch.ones_like(w)) for w in channel_importance(teacher, tiny_images(4), CPU, alone))


def test_presets_say_how_channels_are_weighted():
    weighting = {name: PTQModule(tiny_net(), method=name).method.weighting for name in ("adaround", "brecq", "qdrop")}
    assert weighting == {"adaround": "equal", "brecq": "fisher", "qdrop": "fisher"}
