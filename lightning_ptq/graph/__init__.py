"""From a model to a chain of units: trace, fold batch norm, place quantizers, cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from torch import fx, nn

from lightning_ptq.config import Granularity, QuantConfig, check_option
from lightning_ptq.graph.affine import fold_affine
from lightning_ptq.graph.attention import decompose_attention
from lightning_ptq.graph.capture import capture, likely_image_shape
from lightning_ptq.graph.constants import fold_constants
from lightning_ptq.graph.cuts import computed, find_cuts, find_taps, slices
from lightning_ptq.graph.faithful import check_chain
from lightning_ptq.graph.fold import fold_batch_norm, normalise, untie
from lightning_ptq.graph.given import plain
from lightning_ptq.graph.modularise import modularise
from lightning_ptq.graph.norms import find_norms, give_biases
from lightning_ptq.graph.pairs import find_pairs
from lightning_ptq.graph.placement import FloatOp, Placement, float_ops, place_quantizers
from lightning_ptq.graph.shapes import note_shapes
from lightning_ptq.graph.trace import any_layout_will_do
from lightning_ptq.graph.transposed import crop_transposed, lay_out_transposed
from lightning_ptq.graph.units import Chain, build_unit, unit_names
from lightning_ptq.layers import quantize_layer

__all__ = ["Chain", "ChainPair", "FloatOp", "LayerPlan", "build_chain"]

# Pixels of an image that most networks take, whatever they are for, and that take no time.
_SMALL = 32


@dataclass(frozen=True)
class LayerPlan:
    """A quantized layer: its name and type, the index of its unit, its bits and its number of float parameters.

    `act_bits` are the bits of the activation that it `reads`, by its quantizer's name. `gives` is the quantizer of its
    output, or of what a ReLU, a pool or a view makes of it, if there is one. Mixed precision does not choose those of
    its "weight_bits" and "act_bits" that are `fixed`.
    """

    name: str
    kind: str
    unit: int
    weight_bits: int
    act_bits: int
    parameters: int
    reads: str
    fixed: frozenset[str] = frozenset()
    gives: str | None = None


@dataclass(frozen=True)
class ChainPair:
    """A float teacher and a quantized student with the same cuts and the same weight Parameters.

    Attributes:
        layers: the quantized layers.
        products: names of the products of two activations, both quantized.
        floats: what stays in floating point.
        islands: modules among it that nothing could follow.
    """

    teacher: Chain
    student: Chain
    layers: tuple[LayerPlan, ...]
    products: tuple[str, ...]
    floats: tuple[FloatOp, ...]
    islands: tuple[str, ...]


def build_chain(
    model: nn.Module,
    config: QuantConfig,
    granularity: Granularity,
    *,
    rounding: str = "nearest",
    leaf_modules: Sequence[str] = (),
    image_shape: Sequence[int] | None = None,
    is_part: bool = False,
) -> ChainPair:
    """Turn `model` into a teacher and a student, cut into units; the model itself is not modified.

    Args:
        model: in eval mode, takes one tensor and returns one tensor.
        config: bits and placement.
        granularity: "layer", "block", "stage" or "net": what one unit holds.
        rounding: how the student's weights are rounded.
        leaf_modules: patterns of qualified names of modules to keep whole, in float, instead of tracing them.
        image_shape: (C, H, W) of the images, for models that only torch.export can follow; None guesses it.
        is_part: of another model, which reads all of its outputs: they are returned packed (`pack.py`), not the main
            one only, and are no scores of classes.

    Raises:
        PTQError: what `plain` raises; the model cannot be traced or has nothing to quantize; a pattern matches
            nothing; an unknown granularity.
    """
    check_option(granularity, get_args(Granularity), "granularity")
    model = plain(model)
    captured = capture(model, leaf_modules, image_shape, is_part)
    gm = captured.gm
    normalise(gm)
    fold_constants(gm)
    decompose_attention(gm, leaf_modules)
    modularise(gm, leaf_modules)
    lay_out_transposed(gm)
    untie(gm)
    shape = captured.image_shape or tuple(image_shape or ()) or likely_image_shape(model)
    if captured.image_shape is None:
        note_shapes(gm, shape)
    fold_affine(gm)  # what lies between a layer and its batch norm, and what lies behind
    fold_batch_norm(gm)
    fold_affine(gm)
    crop_transposed(gm)
    placement = place_quantizers(gm, config, leaf_modules)
    norms = find_norms(placement) if config.norms != "none" else ()
    give_biases(gm, norms)
    pairs = find_pairs(placement) if config.pairs != "none" else ()
    gm.requires_grad_(False)
    nodes = list(slices(computed(gm.graph), find_cuts(placement, granularity)))
    layers = plan_layers(placement, nodes)
    names = unit_names([[layer.name for layer in layers if layer.unit == k] for k in range(len(nodes))])
    quantized = {
        layer.name: quantize_layer(gm.get_submodule(layer.name), layer.weight_bits, config, rounding)
        for layer in layers
    }

    ends = [*(unit[-1] for unit in nodes[:-1]), result_of(gm)]
    starts = [image_of(gm.graph), *ends[:-1]]
    taps = [find_taps(placement, unit) if granularity == "layer" else [] for unit in nodes]
    parts = list(zip(nodes, starts, ends, taps, strict=True))
    student = [build_unit(gm, unit, start, end, quantized, (), inner) for unit, start, end, inner in parts]
    teacher = [build_unit(gm, unit, start, end, {}, placement.quantizers, inner) for unit, start, end, inner in parts]
    any_layout = any_layout_will_do(gm)
    floating = Chain(teacher, names, any_layout, captured.image_shape, is_part=is_part).eval()
    check_chain(model, floating, [shape] if captured.image_shape else [(shape[0], _SMALL, _SMALL), shape])
    return ChainPair(
        floating,
        Chain(student, names, any_layout, captured.image_shape, norms, pairs, is_part).eval(),
        layers,
        tuple(placement.products.values()),
        float_ops(placement, captured.islands),
        captured.islands,
    )


def plan_layers(placement: Placement, units: Sequence[Sequence[fx.Node]]) -> tuple[LayerPlan, ...]:
    """The quantized layers in the order of the units."""
    plans = []
    for k, unit in enumerate(units):
        for node in unit:
            if node in placement.layers:
                name, bits = str(node.target), placement.layers[node]
                module = placement.gm.get_submodule(name)
                count = sum(parameter.numel() for parameter in module.parameters())
                plans.append(
                    LayerPlan(
                        name,
                        type(module).__name__,
                        k,
                        bits.weight_bits,
                        bits.act_bits,
                        count,
                        placement.reads[node],
                        bits.fixed,
                        placement.gives.get(node),
                    )
                )
    return tuple(plans)


def image_of(graph: fx.Graph) -> fx.Node:
    """The node that stands for the network's input."""
    images: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    return images[0]


def result_of(gm: fx.GraphModule) -> fx.Node:
    """The node that the network returns."""
    result = gm.graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    return result
