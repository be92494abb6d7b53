"""Parts of a graph that no image reaches: computed once, not in every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_ptq.graph.trace import attribute_of


@torch.no_grad()
def fold_constants(gm: fx.GraphModule) -> None:
    """Replace what follows from parameters and constants alone by its value (position tables, masks, standardised
    weights): a parameter where any parameter is in it, else a buffer.
    """
    values: dict[fx.Node, Any] = {}
    learned: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            values[node] = attribute_of(gm, str(node.target))
            if isinstance(values[node], nn.Parameter):
                learned.add(node)
        elif node.op in ("call_function", "call_method") and all(s in values for s in node.all_input_nodes):
            if any(source in learned for source in node.all_input_nodes):
                learned.add(node)
            args = fx.map_arg(node.args, values.__getitem__)
            kwargs = fx.map_arg(node.kwargs, values.__getitem__)
            if node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        if node.op != "get_attr" and isinstance(value, Tensor) and any(user not in values for user in node.users):
            name = f"constant_{node.name}"
            if node in learned:
                gm.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
            else:
                gm.register_buffer(name, value.clone())
            with gm.graph.inserting_before(node):
                fetched = gm.graph.get_attr(name)
            fetched.meta = dict(node.meta)
            node.replace_all_uses_with(fetched)
    gm.graph.eliminate_dead_code()
    gm.recompile()
