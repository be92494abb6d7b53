"""Attention as what it computes: two products with a softmax between them, so that both products can be quantized."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lightning_ptq.graph.trace import attribute_of, is_inside, is_torch_op, op_name

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def decompose_attention(gm: fx.GraphModule, leaf_modules: Sequence[str] = ()) -> None:
    """Write every `scaled_dot_product_attention` out as softmax(q k^T * scale + mask) v, in place.

    One that is causal, drops, shares keys between heads or has a mask of unknown type stays as it is, and so does one
    inside a module that a pattern of `leaf_modules` names. A query whose mask lets nothing pass gets NaN, where torch
    gives 0; with a mask that is a constant such an attention stays, too.
    """
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and op_name(node) == "scaled_dot_product_attention" and is_torch_op(node):
            given = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
            known = given.get("attn_mask") is None or mask_type(gm, given["attn_mask"]) is not None
            unusual = given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa")
            if known and not unusual and not is_inside(node, leaf_modules):
                write_out(gm, node, given)
    gm.recompile()


def mask_type(gm: fx.GraphModule, mask: fx.Node) -> torch.dtype | None:
    """Type of an attention mask; None where it is not known, or shuts a query out altogether."""
    if mask.op != "get_attr":
        value = mask.meta.get("val")
        return value.dtype if isinstance(value, Tensor) else None
    value = attribute_of(gm, str(mask.target))
    shut = ~value if value.dtype == torch.bool else value == float("-inf")
    return None if bool(shut.all(-1).any()) else value.dtype


def write_out(gm: fx.GraphModule, node: fx.Node, given: dict[str, Any]) -> None:
    """Put products and softmax in place of the attention `node`."""
    q, k, v, mask, scale = (given.get(key) for key in ("query", "key", "value", "attn_mask", "scale"))
    assert isinstance(q, fx.Node)

    def call(function: Any, *args: Any) -> fx.Node:
        new = gm.graph.call_function(function, args)
        new.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack") or {})
        return new

    with gm.graph.inserting_before(node):
        if scale is None:
            value = q.meta.get("val")
            size = value.shape[-1] if isinstance(value, Tensor) else gm.graph.call_method("size", (q, -1))
            scale = size**-0.5 if isinstance(size, int) else call(operator.pow, size, -0.5)
        scores = call(torch.mul, call(torch.matmul, q, call(torch.transpose, k, -2, -1)), scale)  # (..., L, S)
        if mask is not None and mask_type(gm, mask) == torch.bool:
            scores = call(torch.masked_fill, scores, call(torch.logical_not, mask), float("-inf"))
        elif mask is not None:
            scores = call(torch.add, scores, mask)
        result = call(torch.matmul, call(torch.softmax, scores, -1), v)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
