"""Biases are corrected by what quantization adds to a layer's mean (Nagel et al. 2019), or rounded as kernels do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from lightning_ptq.cache import UnitCache
from lightning_ptq.graph import Chain, LayerPlan
from lightning_ptq.layers import quantized_layers
from lightning_ptq.quantizers import ActQuantizer
from lightning_ptq.store import chunks, widened
from lightning_ptq.weights import WeightQuantizer


@torch.no_grad()
def correct_biases(cache: UnitCache, mean: Callable[[Tensor], Tensor]) -> None:
    """Shift the bias of every layer of the cache's unit so that its output has the teacher's mean in every channel.

    Layer by layer, each with those before it corrected and with what the quantized network gives the unit: a pass of
    the unit for each of its layers. Nothing is learned, and nothing costs anything at inference.

    Args:
        mean: averages a tensor over processes.
    """
    teacher, student = cache.teacher.units[cache.unit], cache.student.units[cache.unit]
    assert isinstance(student, fx.GraphModule)
    layers = dict(quantized_layers(student))
    called = [str(node.target) for node in student.graph.nodes if node.op == "call_module"]  # the order that counts
    for name, layer in ((name, layers[name]) for name in called if name in layers):
        dim, drawn = layer.channel_dim, slice(cache.drawn)
        wanted = channel_means(teacher, name, dim, cache.teacher_in[drawn], cache.device)
        found = channel_means(student, name, dim, cache.student_in[drawn], cache.device)
        layer.weight_quantizer.bias_shift.add_(mean(wanted - found))


@torch.no_grad()
def round_biases(student: Chain, layers: Sequence[LayerPlan], everywhere: bool) -> None:
    """Make biases multiples of input scale x weight scale, in which an integer kernel adds up its products.

    ONNX Runtime rounds to that what stands between integers of 8 bits, whether or not it has a kernel for it; so the
    simulation does, too.

    Args:
        everywhere: all of them, as kernels want; else those of layers whose output is quantized to 8 bits.
    """
    for plan in layers:
        given = None if plan.gives is None else student.find(plan.gives)
        if not (everywhere or (isinstance(given, ActQuantizer) and given.bits == 8)):
            continue
        layer, read = student.find(plan.name), student.find(plan.reads)
        assert isinstance(read, ActQuantizer)
        q = layer.weight_quantizer
        assert isinstance(q, WeightQuantizer)
        bias = q.correct(layer._parameters["bias"])
        if bias is not None and bool(bias.any()):
            step = read.scale * q.effective_scale.flatten()  # (O,), or (1,)
            q.bias_shift.add_((bias / step).round() * step - bias)


def channel_means(unit: nn.Module, layer: str, dim: int, x: Tensor, device: torch.device) -> Tensor:
    """Mean of each channel (C,), found at `dim`, of what the layer called `layer` gives for the unit's input `x`."""
    sums: list[Tensor] = []
    count = 0

    def note(_: nn.Module, __: object, out: Tensor) -> None:
        nonlocal count
        rows = out.float().movedim(dim, -1).flatten(0, -2)  # rows of windows as well as of images
        sums.append(rows.double().sum(0))
        count += len(rows)

    hook = unit.get_submodule(layer).register_forward_hook(note)
    try:
        for part in chunks(x):
            unit(widened(part.to(device)))
    finally:
        hook.remove()
    return (torch.stack(sums).sum(0) / count).float()
