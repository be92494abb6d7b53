"""Where networks are cut, and that the pieces are the network."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_ptq.config import QuantConfig
from lightning_ptq.graph import build_chain
from lightning_ptq.models import digits_net, resnet20

GRANULARITIES = ("layer", "block", "stage", "net")


def names(model, granularity="block"):
    return build_chain(model.eval(), QuantConfig(), granularity).student.names


def torchvision_model(name):
    return torchvision.models.get_model(name, weights=None).eval()


def test_cifar_resnet20_is_a_stem_nine_blocks_and_a_head():
    blocks = tuple(f"layer{s}.{b}" for s in (1, 2, 3) for b in (0, 1, 2))
    assert names(resnet20()) == ("conv1", *blocks, "linear")
    assert names(resnet20(), "stage") == ("conv1+layer1", "layer2", "layer3+linear")
    assert names(resnet20(), "net") == ("net",)


class Wrapped(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone((x - 0.5) / 0.25)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1", "alexnet"])
@pytest.mark.parametrize("granularity", ["layer", "block", "stage"])
def test_a_wrapped_model_is_cut_like_the_bare_one(name, granularity):
    model = torchvision_model(name)
    bare = build_chain(model, QuantConfig(), granularity)
    wrapped = build_chain(Wrapped(Wrapped(model)).eval(), QuantConfig(), granularity)
    assert [plan.unit for plan in wrapped.layers] == [plan.unit for plan in bare.layers]


@pytest.mark.parametrize(
    "model", [resnet20(), digits_net(), *map(torchvision_model, ["resnet18", "shufflenet_v2_x0_5"])]
)
def test_coarser_granularities_have_fewer_units_and_only_cut_where_finer_ones_do(model):
    pairs = [build_chain(model.eval(), QuantConfig(), granularity) for granularity in GRANULARITIES]
    lengths = [len(pair.student) for pair in pairs]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1
    cuts = [{i for i, (a, b) in enumerate(pairwise(pair.layers)) if a.unit != b.unit} for pair in pairs]
    assert all(coarse <= fine for fine, coarse in pairwise(cuts))
    for pair in pairs:
        assert {plan.unit for plan in pair.layers} == set(range(len(pair.student)))
        assert pair.teacher.names == pair.student.names


def test_stages_start_where_the_resolution_falls():
    assert names(torchvision_model("resnet18"), "stage") == ("conv1", "layer1", "layer2", "layer3", "layer4+fc")
    stages = names(torchvision_model("vgg11"), "stage")
    assert stages[:2] == ("features.0", "features.3")
    assert stages[-1] == "classifier"


class Strided(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)[:, :, ::2, ::2]))


def test_a_strided_slice_starts_a_stage():
    assert names(Strided(), "stage") == ("a", "b+c")


def test_a_non_residual_instance_of_a_block_class_stays_whole():
    class Block(nn.Module):
        def __init__(self, residual):
            super().__init__()
            self.one, self.two, self.residual = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), residual

        def forward(self, x):
            y = self.two(self.one(x).relu())
            return x + y if self.residual else y

    assert names(nn.Sequential(Block(False), Block(True), nn.Conv2d(3, 3, 1))) == ("0", "1", "2")
    # Without a residual anywhere nothing says that the class is a block.
    assert names(nn.Sequential(Block(False), Block(False))) == ("0.one", "0.two", "1.one", "1.two")


def test_preactivation_blocks_are_cut_before_their_activation():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.skip = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x):
            x = x.relu()
            return self.skip(x) + self.two(self.one(x).relu())

    assert names(nn.Sequential(nn.Conv2d(3, 3, 1), Block(), Block())) == ("0", "1", "2")


def test_a_block_that_is_called_twice_is_two_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return x + self.two(self.one(x).relu())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 3, 1), Block()

        def forward(self, x):
            return self.block(self.block(self.stem(x)))

    pair = build_chain(Net().eval(), QuantConfig(), "block")
    assert [plan.unit for plan in pair.layers] == [0, 1, 1, 2, 2]
    assert len(set(pair.student.names)) == 3


@torch.fx.wrap
def halves(x):
    return x[:, :2], x[:, 2:]


@torch.fx.wrap
def double(x):
    return 2 * x


class Odd(nn.Module):
    """Tuples, integers, opaque functions and constants between convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc, self.gain = nn.Linear(16, 3), nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        left, right = halves(double(self.one(x)))
        x = torch.cat([right, left], 1) * self.gain
        a, b = self.two(x).chunk(2, dim=1)
        x = self.three(torch.cat([b, a], 1) * self.gain)
        n, c = x.shape[0], x.shape[1]
        return self.fc(x.reshape(n, c * x.shape[2] * x.shape[3]))


@torch.no_grad()
def test_only_tensors_cross_cuts():
    model, x = Odd().eval(), torch.randn(2, 4, 2, 2)
    pair = build_chain(model, QuantConfig(), "layer")
    assert pair.student.names == ("one", "two", "three", "fc")
    assert torch.equal(pair.student(x), model(x))
    for unit in pair.teacher.units:
        x = unit(x)
        assert isinstance(x, torch.Tensor)
    holders = [unit.gain for unit in pair.teacher.units if hasattr(unit, "gain")]
    assert len(holders) == 2  # a constant is fetched by every unit that reads it, and is the same Parameter
    assert holders[0] is holders[1]


PAIR = build_chain(digits_net().eval(), QuantConfig(), "layer")
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@settings(max_examples=20, deadline=None)
@given(k=st.integers(0, len(PAIR.teacher)), student=st.booleans())
def test_a_chain_can_be_run_in_two_parts(k, student):
    chain = PAIR.student if student else PAIR.teacher
    with torch.no_grad():
        assert torch.equal(chain(chain(IMAGES, 0, k), k), chain(IMAGES))


@torch.no_grad()
def test_every_tail_of_the_teacher_gives_the_original_logits():
    torch.manual_seed(0)
    model = torchvision_model("resnet18")
    pair, x = build_chain(model, QuantConfig(), "block"), torch.randn(1, 3, 64, 64)
    logits, outputs = model(x), []
    hooks = [
        m.register_forward_hook(lambda m, a, y: outputs.append(y)) for s in (1, 2) for m in getattr(model, f"layer{s}")
    ]
    model(x)
    assert len(hooks) == 4
    for k, output in enumerate(outputs):  # after the stem, unit k + 1 is block k
        torch.testing.assert_close(pair.teacher(x, 0, k + 2), output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pair.teacher(output, k + 2), logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_chain_can_be_copied_and_pickled():
    for other in (copy.deepcopy(PAIR.student), pickle.loads(pickle.dumps(PAIR.student))):
        assert other.names == PAIR.student.names
        assert list(other.state_dict()) == list(PAIR.student.state_dict())
        assert torch.equal(other(IMAGES), PAIR.student(IMAGES))


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "any_layout"),
    [(3, 1, 2, False), (3, 1, 1, True), (3, 3, 2, True), (16, 1, 2, True)],
)
def test_channels_last_is_not_used_where_torchs_backward_pass_corrupts_memory(channels, kernel, stride, any_layout):
    net = nn.Sequential(nn.Conv2d(channels, 8, kernel, stride), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    assert build_chain(net, QuantConfig(), "layer").student.any_layout is any_layout
