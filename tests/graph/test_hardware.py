"""Quantizers around everything that has an integer kernel, and biases as its accumulator holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ptq import PTQError, QuantConfig
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.arithmetic import multiply_adds
from lightning_ptq.layers import quantized_layers
from lightning_ptq.quantizers import ActQuantizer
from tests.helpers import tiny_data, tiny_images, tiny_module, tiny_net, trainer

HARDWARE = QuantConfig(8, 8, placement="hardware", weight_symmetric=True)


class Net(nn.Module):
    """Pools, a concatenation, an addition, a moved tensor, and an activation that no kernel computes with a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.a(x)))  # 4x4
        y = nn.functional.gelu(self.b(x))
        x = self.c(torch.cat([x, y], 1)) + x
        return self.fc(nn.functional.avg_pool2d(x, 2).flatten(1))


def quantized(net: nn.Module, quant: QuantConfig) -> list[str]:
    """What the quantizers of a network read, by the name of the operation that gives it."""
    chain = build_chain(net.eval(), quant, "net").student
    (unit,) = chain.units
    return [
        node.all_input_nodes[0].name
        for node in unit.graph.nodes
        if node.op == "call_module" and isinstance(unit.get_submodule(str(node.target)), ActQuantizer)
    ]


def test_both_sides_of_every_kernel_are_quantized_and_nothing_else() -> None:
    paper = quantized(Net(), QuantConfig(8, 8))
    assert paper == ["x", "pool", "cat", "flatten"]
    # The pool and the flattening share the quantizers of what they read; the convolution b is read by gelu, which is
    # computed apart; the last layer's output stays float.
    assert quantized(Net(), HARDWARE) == ["x", "relu", "b", "gelu", "cat", "c", "add", "avg_pool2d"]
    blocks = ["relu_1", "blocks_0_conv2", "relu_2", "relu_3", "blocks_1_conv2", "relu_4"]
    assert quantized(tiny_net(), HARDWARE) == ["x", "relu", *blocks, "mean"]


@torch.no_grad()
def test_the_function_without_ranges_and_the_share_are_the_same() -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), tiny_images(8)
    for granularity in ("layer", "block", "net"):
        chains = build_chain(net, HARDWARE, granularity)  # type: ignore[arg-type]
        torch.testing.assert_close(chains.student(x), net(x))
        quantized_share, total = multiply_adds(chains.student, (3, 8, 8))
        assert quantized_share == total
    reads = {layer.name: layer.reads for layer in chains.layers}
    assert reads == {"a": "act_x", "b": "act_relu", "c": "act_cat", "fc": "act_avg_pool2d"}


def test_products_count_as_quantized_where_a_moved_tensor_is(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1).mean(1))

    chains = build_chain(Attention().eval(), HARDWARE, "net")
    share, total = multiply_adds(chains.student, (6, 6))
    assert share == total


def test_biases_are_multiples_of_the_accumulators_step(tmp_path: Path) -> None:
    module = tiny_module(HARDWARE, steps_per_unit=3)
    trainer(tmp_path, logger=False).fit(module, datamodule=tiny_data())
    scales: dict[str, Any] = {layer.name: module.student.find(layer.reads) for layer in module.chains.layers}
    checked = 0
    for unit in module.student.units:
        for name, layer in quantized_layers(unit):
            step = scales[name].scale.detach() * layer.weight_quantizer.effective_scale.detach().flatten()
            _, bias = layer.quantized()
            assert bias is not None
            multiples = bias.detach() / step
            assert float(multiples.abs().max()) > 2
            torch.testing.assert_close(multiples, multiples.round(), rtol=0, atol=1e-2)
            checked += 1
    assert checked == len(module.chains.layers)


def test_asymmetric_weights_are_refused() -> None:
    with pytest.raises(PTQError, match="placement='hardware' needs weight_symmetric=True"):
        QuantConfig(placement="hardware")
