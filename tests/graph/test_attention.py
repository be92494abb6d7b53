"""Attention written out equals torch's own, and both of its products read quantized activations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ptq.config import QuantConfig
from lightning_ptq.graph import build_chain
from lightning_ptq.quantizers import LogQuantizer, act_quantizers


class Attention(nn.Module):
    def __init__(self, heads=2, **options):
        super().__init__()
        self.qkv, self.proj, self.heads, self.options = nn.Linear(8, 24), nn.Linear(8, 8), heads, options

    def forward(self, x):
        q, k, v = self.qkv(x).view(-1, 5, 3, self.heads, 8 // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.proj(y.transpose(1, 2).reshape(-1, 5, 8))


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"dropout_p": 0.0}])
def test_scaled_dot_product_attention_is_two_products_and_a_softmax(options):
    torch.manual_seed(0)
    model, x = Attention(**options).eval().double(), torch.randn(3, 5, 8, dtype=torch.float64)
    pair = build_chain(model, QuantConfig(overrides={"matmul": {"act_bits": 6}}, edges="same"), "block")
    torch.testing.assert_close(pair.student(x), model(x), rtol=1e-12, atol=1e-12)
    assert pair.products == ("matmul", "matmul_1")
    # x, q, v, k^T, softmax, and what proj reads.
    assert [q.bits for q in act_quantizers(pair.student)] == [4, 6, 4, 6, 4, 4]
    assert pair.floats == ()


def test_a_softmax_can_have_a_logarithmic_grid():
    pair = build_chain(Attention().eval(), QuantConfig(softmax="log2"), "block")
    assert [type(q) is LogQuantizer for q in act_quantizers(pair.student)] == [False] * 4 + [True, False]


def test_causal_attention_stays_whole_and_says_so():
    model, x = Attention(is_causal=True).eval(), torch.randn(3, 5, 8)
    pair = build_chain(model, QuantConfig(), "block")
    assert torch.equal(pair.student(x), model(x))
    assert [op.name for op in pair.floats] == ["scaled_dot_product_attention"]


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_becomes_linear_layers_and_products(batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            x = self.patches(x).flatten(2)  # (N, C, L)
            x = x.permute(0, 2, 1) if batch_first else x.permute(2, 0, 1)
            y, _ = self.attention(x, x, x, need_weights=False)
            return self.fc((x + y).mean(1 if batch_first else 0))

    torch.manual_seed(0)
    model, x = Net().eval().double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    nn.init.normal_(model.attention.in_proj_bias)
    pair = build_chain(model, QuantConfig(), "block", image_shape=(3, 8, 8))
    torch.testing.assert_close(pair.student(x), model(x), rtol=1e-12, atol=1e-12)
    assert [plan.name for plan in pair.layers] == ["patches", "attention.in_proj", "attention.out_proj", "fc"]
    assert len(pair.products) == 2
    assert pair.floats == ()
