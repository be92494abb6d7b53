"""Quantized layers: a float layer whose weight passes through a `WeightQuantizer`.

The activation that a layer reads is quantized by an `ActQuantizer` node of the graph (`graph/placement.py`), since
several readers share it. A new layer type is a subclass and one line in the registry.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_ptq.config import QuantConfig
from lightning_ptq.functional import in_float32, swap_channels
from lightning_ptq.weights import ROUNDINGS, WeightQuantizer

_Layer = TypeVar("_Layer", bound=nn.Module)
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def retyped(kind: type[_Layer], layer: nn.Module) -> _Layer:
    """A `kind` with the attributes and the very Parameters of `layer`."""
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    for name, value in vars(layer).items():
        if name not in ("_parameters", "_buffers", "_modules") and not name.endswith("_hooks"):
            twin.__dict__[name] = value
    for name, parameter in layer._parameters.items():
        twin.register_parameter(name, parameter)
    return twin


class ConvTranspose(_ConvTransposeNd):
    """Transposed convolution in 1 to 3 dimensions whose weight is laid out as a convolution's: (O, I/groups, k...).

    In torch's own layout, (I, O/groups, k...), no dimension is that of the output channels if there are groups. Here
    whatever looks at a weight's channels (scales, folded norms, corrections) finds them where it does in any layer.

    Shape: (N, I, L...) -> (N, O, L'...).
    """

    @classmethod
    def from_torch(cls, layer: _ConvTransposeNd) -> ConvTranspose:
        """The same layer with a weight of its own, laid out anew."""
        twin, weight = retyped(cls, layer), swap_channels(layer.weight.detach(), layer.groups)
        twin.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        return twin

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        function = TRANSPOSED[len(self.kernel_size)]
        weight, padding = swap_channels(weight, self.groups), self.padding
        assert not isinstance(padding, str)
        return function(x, weight, bias, self.stride, padding, self.output_padding, self.groups, self.dilation)


class QuantizedLayer(nn.Module):
    """What quantized layers share: they are made from a float layer and keep its parameters, not copies."""

    weight: Tensor
    weight_quantizer: WeightQuantizer
    channel_dim = 1  # of the output

    @classmethod
    def from_float(cls: type[_Layer], layer: nn.Module, quantizer: WeightQuantizer) -> _Layer:
        """The quantized twin of `layer`: same attributes, same Parameter objects, its own quantizer."""
        twin = retyped(cls, layer)
        twin.add_module("weight_quantizer", quantizer)
        return twin

    def quantized(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as this layer computes with them."""
        return self.weight_quantizer(self.weight), self.weight_quantizer.correct(self._parameters["bias"])

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the float layer computes, with this weight and bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q = self.weight_quantizer
        if q.is_learned or q.nearest or not (q.enabled and q.log_gain.requires_grad and torch.is_grad_enabled()):
            return self.compute(x, *self.quantized())
        # Gains that are trained without the rounding act on the output: the weight then needs no gradient, and that is
        # a third of a convolution's arithmetic.
        y = self.compute(x, q(self.weight, gain=False), None)
        shape = [-1 if dim == self.channel_dim % y.dim() else 1 for dim in range(y.dim())]
        bias = q.correct(self._parameters["bias"])
        assert bias is not None
        with in_float32(y.device):  # half precision would round small gains away
            return torch.addcmul(bias.view(shape), y.float(), q.log_gain.exp().view(shape)).to(y.dtype)


class _QuantConv(QuantizedLayer):
    """What quantized convolutions share."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)  # type: ignore[no-any-return,operator]


class QuantConv2d(_QuantConv, nn.Conv2d):
    """2-d convolution with quantized weight (O, I/groups, kH, kW). Shape: (N, I, H, W) -> (N, O, H', W')."""


class QuantConv1d(_QuantConv, nn.Conv1d):
    """1-d convolution with quantized weight (O, I/groups, k). Shape: (N, I, L) -> (N, O, L')."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """3-d convolution with quantized weight (O, I/groups, kD, kH, kW). Shape: (N, I, D, H, W) -> (N, O, D', H', W')."""


class QuantConvTranspose(_QuantConv, ConvTranspose):
    """Transposed convolution with quantized weight (O, I/groups, k...). Shape: (N, I, L...) -> (N, O, L'...)."""


class QuantLinear(QuantizedLayer, nn.Linear):
    """Linear layer with quantized weight (O, I). Shape: (..., I) -> (..., O)."""

    channel_dim = -1

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


REGISTRY: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv2d: QuantConv2d,
    nn.Conv1d: QuantConv1d,
    nn.Conv3d: QuantConv3d,
    ConvTranspose: QuantConvTranspose,
    nn.Linear: QuantLinear,
}


def is_quantizable(module: nn.Module) -> bool:
    """Whether `module` has a quantized twin. Exact types only: a subclass may compute something else."""
    return type(module) in REGISTRY


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is such a twin."""
    return isinstance(module, QuantizedLayer)


def quantize_layer(module: nn.Module, bits: int, config: QuantConfig, rounding: str = "nearest") -> nn.Module:
    """The quantized twin of a float layer; it shares the layer's parameters and computes the same without ranges."""
    assert isinstance(module.weight, Tensor)
    quantizer = ROUNDINGS[rounding](
        module.weight.shape,
        bits,
        per_channel=config.weight_per == "channel",
        symmetric=config.weight_symmetric,
    )
    return REGISTRY[type(module)].from_float(module, quantizer)


def quantized_layers(module: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    """(name, layer) of every quantized layer below `module`, in order."""
    return [(name, m) for name, m in module.named_modules() if isinstance(m, QuantizedLayer)]
