"""Batch-norm folding against the formula in fp64; what is not folded says why."""

import pytest
import torch
from torch import nn

from lightning_ptq.config import QuantConfig
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.fold import fold_batch_norm, normalise
from lightning_ptq.graph.trace import trace


def randomise(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value in (module.running_var, module.weight):
                if value is not None:
                    nn.init.uniform_(value, 0.3, 2.0)
            for value in (module.running_mean, module.bias):
                if value is not None:
                    nn.init.normal_(value)
    return model.eval()


def folded(model):
    gm = trace(model)
    normalise(gm)
    fold_batch_norm(gm)
    return gm


def norms(gm):
    return [m for m in gm.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (2, 4, 7, 7)),
        (nn.Conv2d(4, 6, 3, bias=False, padding_mode="reflect", padding=1), nn.BatchNorm2d(6), (2, 4, 7, 7)),
        (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (2, 4, 7, 7)),
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 7)),
        (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
        (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (5, 4)),
    ],
)
@torch.no_grad()
def test_folding_equals_the_fp64_model(layer, norm, shape):
    model = randomise(nn.Sequential(layer, norm))
    x = torch.randn(shape)
    gm = folded(model)
    graph_calls = [node.target for node in gm.graph.nodes if node.op == "call_module"]
    assert graph_calls == ["0"]
    reference = model.double()(x.double())
    assert (gm(x) - reference).abs().max() <= 1e-6 * reference.abs().max()

    scale = (norm.weight if norm.affine else 1) / (norm.running_var + norm.eps).sqrt()
    weight = layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    torch.testing.assert_close(gm.get_submodule("0").weight, weight.float(), rtol=0, atol=0)


class Tapped(nn.Module):
    """The convolution's output is read by the batch norm and by an addition."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (Tapped(), "bn", "'conv' is also read by 'add'"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), "2", r"follows '1' \(ReLU\)"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_folded_stays_and_says_why(model, name, reason):
    model, x = randomise(model), torch.randn(2, 3, 5, 5)
    gm = folded(model)
    assert len(norms(gm)) == 1
    torch.testing.assert_close(gm(x), model(x))
    pair = build_chain(model, QuantConfig(), "layer")
    floats = {op.name: op.reason for op in pair.floats}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(floats[name])
    torch.testing.assert_close(pair.student(x), model(x))


def test_a_norm_without_running_statistics_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    pair = build_chain(model, QuantConfig(), "layer")
    assert [(op.name, op.reason) for op in pair.floats] == [
        ("1", "batch norm not folded: it has no running statistics")
    ]


@torch.no_grad()
def test_a_shared_layer_is_untied_so_that_each_call_has_its_own_quantizer_and_norm():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn2(self.conv(self.bn1(self.conv(x)).relu()))

    model, x = randomise(Shared()), torch.randn(2, 3, 5, 5)
    pair = build_chain(model, QuantConfig(), "layer")
    assert [plan.name for plan in pair.layers] == ["conv", "conv_1"]
    assert pair.student.names == ("conv", "conv_1")
    torch.testing.assert_close(pair.student(x), model(x))
    first, second = pair.student.units[0].conv, pair.student.units[1].conv_1
    assert not torch.equal(first.weight, second.weight)  # each has its own norm in it
    assert pair.floats == ()


class Flattens(nn.Module):
    """As many write it: `view` takes only what lies in memory one way."""

    def __init__(self, whole: bool = False):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)
        self.flat = Flat() if whole else nn.Identity()
        self.whole = whole

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = self.flat(x) if self.whole else x.view(x.size(0), -1).view(size=(-1, 144))
        return self.fc(x)


class Flat(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def test_view_becomes_reshape_so_that_any_layout_will_do():
    model, x = Flattens().eval(), torch.randn(2, 3, 8, 8)
    teacher = build_chain(model, QuantConfig(), "block").teacher
    assert teacher.any_layout
    last = teacher.laid_out(x, x.device)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        model(last)
    torch.testing.assert_close(teacher(last), model(x))


def test_what_is_kept_whole_gets_the_usual_layout():
    x = torch.randn(2, 3, 8, 8)
    model = Flattens(whole=True).eval()
    teacher = build_chain(model, QuantConfig(), "block", leaf_modules=["flat"]).teacher
    assert not teacher.any_layout
    torch.testing.assert_close(teacher(teacher.laid_out(x, x.device)), model(x))


def test_a_view_as_another_type_stays():
    class Bits(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x.view(torch.int32).view(torch.float32))

    model, x = Bits().eval(), torch.randn(2, 4)
    torch.testing.assert_close(build_chain(model, QuantConfig(), "block").teacher(x), model(x))


def test_a_check_of_shapes_does_not_forbid_to_fold():
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.conv(x)
            torch._assert(y.ndim == 4, "expected 4D input")  # as timm's batch norm with activation does
            return self.fc(self.bn(y).mean((2, 3)))

    model, x = Checked().eval(), torch.randn(2, 3, 6, 6)
    model.bn.running_mean.normal_()
    pair = build_chain(model, QuantConfig(), "layer")
    torch.testing.assert_close(pair.teacher(x), model(x))
    assert pair.floats == ()
