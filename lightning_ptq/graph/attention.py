"""Attention as what it computes: two products with a softmax between them, so that both products can be quantized."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from lightning_ptq.graph.trace import is_torch_op, op_name

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def decompose_attention(gm: fx.GraphModule) -> None:
    """Write every `scaled_dot_product_attention` out as softmax(q k^T * scale + mask) v, in place.

    One that is causal, drops, shares keys between heads or has a mask of unknown type stays as it is.
    """
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and op_name(node) == "scaled_dot_product_attention" and is_torch_op(node):
            given = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
            mask = given.get("attn_mask")
            known = mask is None or isinstance(mask.meta.get("val"), Tensor)
            if known and not (given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa")):
                write_out(gm, node, given)
    gm.recompile()


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
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            scores = call(torch.masked_fill, scores, call(torch.logical_not, mask), float("-inf"))
        elif mask is not None:
            scores = call(torch.add, scores, mask)
        result = call(torch.matmul, call(torch.softmax, scores, -1), v)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
