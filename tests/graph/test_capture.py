"""Every way of capturing a model gives the model's own numbers, in batches of any size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ptq.config import QuantConfig
from lightning_ptq.errors import PTQError
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.capture import capture, likely_image_shape
from tests.helpers import Block


def chains(model, granularity="block", **options):
    return build_chain(model, QuantConfig(), granularity, **options)


@torch.no_grad()
def assert_same(model, pair, *shapes):
    for shape in shapes:
        x = torch.randn(shape, dtype=next(model.parameters()).dtype)
        expected = model(x)
        for chain in (pair.teacher, pair.student):
            torch.testing.assert_close(chain(x), expected, rtol=1e-10, atol=1e-10)


class Windows(nn.Module):
    """What Swin does to shapes: pads to windows, makes rows of them, shifts, puts them together again."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block1, self.block2, self.fc = Window(0), Window(1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x))).permute(0, 2, 3, 1)  # (N, H, W, C)
        return self.fc(self.block2(self.block1(x)).mean((1, 2)))


class Window(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift, self.qkv, self.proj = shift, nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(10, 2))
        self.register_buffer("index", torch.arange(81).view(9, 9) % 10)

    def forward(self, x):
        n, height, width, _ = x.shape
        y = F.pad(x, (0, 0, 0, -width % 3, 0, -height % 3)) if height % 3 or width % 3 else x
        rows, columns = y.shape[1] // 3, y.shape[2] // 3
        y = torch.roll(y, (self.shift, self.shift), (1, 2))
        y = y.view(n, rows, 3, columns, 3, 8).transpose(2, 3).reshape(n * rows * columns, 9, 8)
        q, k, v = self.qkv(y).view(-1, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(9, 9, 2).permute(2, 0, 1)
        mask = torch.zeros(9, 9, dtype=y.dtype)
        mask[:3, 3:] = -1.0  # in place, of a constant
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None] + mask)
        y = self.proj(y.transpose(1, 2).reshape(-1, 9, 8))
        y = y.view(n, rows, columns, 3, 3, 8).transpose(2, 3).reshape(n, rows * 3, columns * 3, 8)
        return x + torch.roll(y, (-self.shift, -self.shift), (1, 2))[:, :height, :width]


def test_what_fx_cannot_follow_is_exported_for_one_image_size_and_batches_of_any():
    torch.manual_seed(0)
    model = Windows().eval().double()
    model.norm.running_mean.normal_(0, 0.2)
    pair = chains(model, image_shape=(3, 8, 8))
    assert_same(model, pair, (1, 3, 8, 8), (2, 3, 8, 8), (7, 3, 8, 8))
    assert pair.student.names == ("stem", "block1", "block2", "fc")
    assert [plan.name for plan in pair.layers] == [
        "stem",
        *(f"block{i}.{n}" for i in (1, 2) for n in ("qkv", "proj")),
        "fc",
    ]
    assert len(pair.products) == 4
    assert pair.floats == ()  # batch norm is folded, the table is a constant
    assert {id(p) for p in pair.teacher.parameters()} <= {id(p) for p in pair.student.parameters()}
    with pytest.raises(PTQError, match=r"captured by torch.export for \(3, 8, 8\).*image_shape=\(3, 9, 9\)"):
        pair.student(torch.randn(2, 3, 9, 9, dtype=torch.float64))


def test_the_model_is_left_alone():
    torch.manual_seed(0)
    model = Windows().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chains(model, image_shape=(3, 8, 8))
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Sized(nn.Module):
    """Interpolates to the size of its image, which fx would carry through the whole network."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3, 2, 1), Block(8), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return {"out": F.interpolate(self.head(self.block(self.stem(x))), x.shape[-2:], mode="bilinear"), "aux": x}


def test_a_size_that_is_read_at_the_end_forbids_no_cut_and_a_dict_gives_its_main_entry():
    model = Sized().eval().double()
    pair = chains(model, image_shape=(3, 8, 8))
    assert pair.student.names == ("stem", "block", "head")
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(pair.student(x), model(x)["out"])
    # Where it forbids none, images of any size will do.
    assert chains(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 2)).eval()).student.image_shape is None


class Gate(nn.Module):
    """Nothing can follow this: what is computed depends on the numbers themselves."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) if float(x.sum()) > 0 else x


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.inner, self.fc = nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), Gate()), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.inner(self.conv(x).mean((2, 3))))


def test_where_both_fail_the_smallest_module_is_an_island_in_float(capfd):
    model = Gated().eval().double()
    with pytest.warns(UserWarning, match=r"Gated: 'inner\.1' stays in floating point.*can follow .*if float\(x\.sum"):
        pair = chains(model, image_shape=(3, 8, 8))
    assert not capfd.readouterr().err, "torch prints its graph"
    assert [plan.name for plan in pair.layers] == ["conv", "fc"]
    reason = "Gate is kept whole, since neither torch.fx nor torch.export can follow it"
    assert [(op.name, op.reason) for op in pair.floats] == [("inner.1", reason)]
    assert_same(model, pair, (2, 3, 8, 8), (3, 3, 9, 9))


def test_the_error_of_last_resort_names_the_line_and_what_export_said():
    class Net(Gated):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else x

    with pytest.raises(PTQError) as caught:
        chains(Net().eval(), image_shape=(3, 8, 8))
    message = str(caught.value)
    assert "return super().forward(x) if float(x.sum()) > 0 else x" in message
    assert "torch.export with images of shape (3, 8, 8) cannot follow it either" in message
    assert "image_shape=(C, H, W)" in message


def test_a_leaf_that_was_asked_for_stays_in_float_whatever_captures_it():
    model = Windows().eval().double()
    pair = chains(model, image_shape=(3, 8, 8), leaf_modules=["block1"])
    assert not [plan.name for plan in pair.layers if plan.name.startswith("block1")]
    assert all(name.startswith("block2.") for name in pair.products)
    assert_same(model, pair, (2, 3, 8, 8))


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ({}, (4, 224, 224)),
        ({"image_size": 64}, (4, 64, 64)),
        ({"img_size": (32, 48)}, (4, 32, 48)),
        ({"default_cfg": {"input_size": (3, 96, 96)}}, (4, 96, 96)),
    ],
)
def test_a_models_image_shape_is_what_it_says(attributes, shape):
    model = nn.Sequential(nn.Conv2d(4, 8, 1))
    vars(model).update(attributes)
    assert likely_image_shape(model) == shape


def test_fx_is_first():
    assert capture(nn.Sequential(nn.Conv2d(3, 4, 1)).eval()).image_shape is None


def test_torchs_own_transformer_layers_hide_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, 4)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))

    model = Net().eval().double()
    pair = chains(model, image_shape=(3, 8, 8))
    inner = [f"encoder.{name}" for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")]
    assert [plan.name for plan in pair.layers] == ["stem", *inner, "head"]
    assert_same(model, pair, (2, 3, 8, 8), (5, 3, 8, 8))


class Positions(nn.Module):
    """Takes 8x8 images only, and refuses others as torchvision's ViT does."""

    def __init__(self):
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 8, 4, 4), nn.MultiheadAttention(8, 2, batch_first=True)
        self.places, self.head = nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 5)

    def forward(self, x):
        torch._assert(x.shape[2] == 8, f"Wrong height! {x.shape[2]}")
        y = self.stem(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.attention(y, y, y)[0].mean(1))


def test_a_wrong_shape_is_refused_and_a_wrong_guess_is_told():
    model = Positions().eval()
    with pytest.raises(PTQError, match=r"fails on images of shape \(3, 9, 9\), which was given: Wrong height! 9"):
        chains(model, image_shape=(3, 9, 9))
    with pytest.raises(PTQError, match=r"image_shape=\(8, 8\) is no \(channels, height, width\)"):
        chains(model, image_shape=(8, 8))
    with pytest.warns(UserWarning, match=r"stay in floating point .*\(3, 224, 224\).*give image_shape"):
        assert len(chains(model).layers) == 2
    assert len(chains(model, image_shape=(3, 8, 8)).layers) == 4


class Fresh(nn.Module):
    """Makes tensors as long as the batch, and converts types; another device must not be baked in."""

    def __init__(self):
        super().__init__()
        self.stem, self.token, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        y = self.stem(x).flatten(2).transpose(1, 2)
        if y.shape[1] != 4:
            y = y[:, :4]
        zeros = torch.zeros(y.shape[0], 1, 8, device=y.device, dtype=y.dtype)
        mask = torch.ones(y.shape[0], 5, 1, device=x.device).to(y)
        return self.head((self.token(torch.cat([zeros, y], 1)) * mask).mean(1))


def test_no_device_is_baked_in():
    model = Fresh().eval()
    pair = chains(model, image_shape=(3, 8, 8))
    assert pair.student.image_shape is not None
    nodes = [node for unit in pair.student.units for node in unit.graph.nodes]
    assert not [
        node for node in nodes if "device" in node.kwargs or any(isinstance(a, torch.device) for a in node.args)
    ]
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(pair.student(x), model(x))
    assert pair.student.to("meta")(x.to("meta")).shape == (3, 5)  # a device of another kind


def test_a_model_that_says_what_images_it_is_for_is_believed() -> None:
    model = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 8, 3))
    assert likely_image_shape(model) == (48, 224, 224)
    model.default_cfg = {"input_size": (3, 160, 128)}  # as timm's have it
    assert likely_image_shape(model) == (3, 160, 128)
