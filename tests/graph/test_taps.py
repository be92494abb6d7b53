"""Layer-wise calibration inside a block: every layer's rounding follows its own layer's error and nothing else."""

import pytest
import torch

from lightning_ptq.calibration import estimate_ranges
from lightning_ptq.config import QuantConfig
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.taps import recorded
from lightning_ptq.losses import Reconstruction
from lightning_ptq.losses.reconstruction import reconstruction_loss
from tests.helpers import tiny_images, tiny_net
from tests.losses.helpers import unit_batch


def quantized_chains(granularity):
    chains = build_chain(tiny_net(), QuantConfig(weight_bits=2, act_bits=4), granularity, rounding="adaround")
    estimate_ranges(chains.student, tiny_images(), QuantConfig(), torch.device("cpu"), lambda x: x[None])
    return chains


def test_without_recording_taps_change_nothing():
    layer, block = quantized_chains("layer"), quantized_chains("block")
    assert torch.equal(layer.student(tiny_images()), block.student(tiny_images()))
    assert torch.equal(layer.teacher(tiny_images()), block.teacher(tiny_images()))


@pytest.mark.parametrize(("granularity", "taps"), [("layer", [0, 1, 1, 0]), ("block", [0, 0, 0, 0]), ("net", [0])])
def test_taps_are_where_layers_end_and_the_chain_is_not_cut(granularity, taps):
    chains = quantized_chains(granularity)
    for chain in (chains.student, chains.teacher):
        x = tiny_images(2)
        for unit, expected in zip(chain.units, taps, strict=True):
            with torch.no_grad(), recorded(unit) as inner:
                x = unit(x)
            assert len(inner) == expected


def test_each_layer_is_trained_on_its_own_output():
    chains = quantized_chains("layer")
    student, teacher = chains.student.units[1], chains.teacher.units[1]
    with torch.no_grad():
        student_in, teacher_in = chains.student.units[0](tiny_images(8)), chains.teacher.units[0](tiny_images(8))
    first, second = (student.get_submodule(f"blocks.0.conv{k}") for k in (1, 2))
    alphas = [layer.weight_quantizer.alpha.requires_grad_(True) for layer in (first, second)]

    with recorded(student) as inner:
        out = student(student_in)
    with torch.no_grad(), recorded(teacher) as teacher_inner:
        target = teacher(teacher_in)
    pairs = list(zip(inner, teacher_inner, strict=True))
    batch = unit_batch(out, target, student_unit=student, inner=pairs)
    gradients = torch.autograd.grad(Reconstruction()(batch), alphas)

    # By hand: the first convolution with its activation alone, then the rest of the block on what that gives.
    hidden = student.act_relu_1(torch.relu(first(student_in)))
    own = reconstruction_loss(hidden, torch.relu(teacher.get_submodule("blocks.0.conv1")(teacher_in)))
    rest = reconstruction_loss(student.act_relu_2(torch.relu(second(hidden.detach()) + student_in)), target)
    expected = torch.autograd.grad(own, alphas[0]) + torch.autograd.grad(rest, alphas[1])
    for gradient, truth in zip(gradients, expected, strict=True):
        assert truth.abs().max() > 0
        torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-9)
