"""The shipped networks."""

import torch
from torch import nn

from lightning_ptq.models import digits_net, resnet20


def test_resnet20_has_the_values_and_names_of_the_published_state_dict():
    state = resnet20().state_dict()
    blocks = [f"layer{s}.{b}." for s in (1, 2, 3) for b in (0, 1, 2)]
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", *(f"bn1.{n}" for n in bn)]
    for block in blocks:
        for i in (1, 2):
            names += [f"{block}conv{i}.weight", *(f"{block}bn{i}.{n}" for n in bn)]
    names += ["linear.weight", "linear.bias"]
    assert list(state) == names
    assert sum(value.numel() for value in state.values()) == 271_117


@torch.no_grad()
def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    block = resnet20().eval().layer2[0]
    x = torch.randn(1, 16, 4, 4)
    shortcut = torch.zeros(1, 32, 2, 2)
    for c in range(16):
        for i in range(2):
            for j in range(2):
                shortcut[0, 8 + c, i, j] = x[0, c, 2 * i, 2 * j]
    assert torch.equal(block.shortcut(x), shortcut)
    nn.init.zeros_(block.bn2.weight)
    assert torch.equal(block(x), shortcut.relu())


def test_digits_net_is_small_and_takes_eight_by_eight_images():
    model = digits_net().eval()
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert 20_000 <= sum(p.numel() for p in model.parameters()) <= 40_000


def test_published_teacher_loads_strictly(cifar_root):
    state = torch.load(cifar_root / "teachers" / "resnet20.pt", weights_only=True)
    model = resnet20()
    model.load_state_dict(state, strict=True)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).isfinite().all()
