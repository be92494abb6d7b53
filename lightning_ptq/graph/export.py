"""Graph of a model by `torch.export`, where `torch.fx` cannot follow its Python: any batch size, one image size.

The result looks as if fx had traced it, with functions in place of all modules and `nn_module_stack` on every node;
`modularise.py` then makes modules of what has weights.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export

from lightning_ptq.graph.trace import op_name, set_output, words

# Copies of memory and checks: they change no value.
_NO_OPS = words("clone alias detach lift_fresh_copy lift_fresh contiguous dropout")
_CHECKS = words("_assert_tensor_metadata _assert_scalar sym_constrain_range sym_constrain_range_for_size")
# What reads a tensor's type only.
_NEW = words("new_zeros new_ones new_full zeros_like ones_like full_like")
# What makes tensors on a device that it names.
_FACTORIES = {name: getattr(torch.ops.aten, f"new_{name}").default for name in ("zeros", "ones", "full", "empty")}
_END = 2**62


def exported(model: nn.Module, image_shape: Sequence[int], is_part: bool = False) -> fx.GraphModule:
    """The graph of a copy of `model`, in eval mode, for images of `image_shape` (C, H, W) in batches of any size.

    All outputs of what `is_part` of another model are returned, packed, not the main one only.

    Raises:
        Exception: whatever `torch.export` raises.
        PTQError: the model returns something else than a tensor or a dict with one.
    """
    model = deepcopy(model).requires_grad_(False)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    images = torch.zeros(2, *image_shape, dtype=dtype, device=device)
    # What it prints of a failure is the graph up to there.
    silent = redirect_stderr(io.StringIO())
    with warnings.catch_warnings(), torch.no_grad(), attention_written_out(), unlogged(), silent:
        warnings.simplefilter("ignore")  # about versions to come, of what torch itself calls
        program = export(model, (images,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
        gm = program.run_decompositions({}).module(check_guards=False)  # {}: nothing in place, all else as it is
    assert isinstance(gm, fx.GraphModule)
    output = gm.graph.output_node()
    values = torch.utils._pytree.tree_unflatten(_numbers(output.args[0]), program.call_spec.out_spec)
    set_output(model, gm, values, is_part)
    restore_stacks(gm, model)
    for node in list(gm.graph.nodes):
        simplify(gm, node)
    mark_batch_sizes(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph._codegen = fx.graph.CodeGen()  # tensor in, tensor out: export's own takes and gives pytrees
    return fx.GraphModule(gm, gm.graph)


@contextmanager
def unlogged() -> Iterator[None]:
    """Inside, nothing is logged: reasons come with the exception, and logged look like a crash where all is well."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def attention_written_out() -> Iterator[None]:
    """Inside, torch's transformer modules call no fused kernel of their own, which nothing could look into."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def restore_stacks(gm: fx.GraphModule, model: nn.Module) -> None:
    """Give every node's `nn_module_stack` its classes back: export leaves their names."""
    classes = {name: type(module) for name, module in model.named_modules()}
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        # A module called twice is "name" and "name@1".
        node.meta["nn_module_stack"] = {
            key: (path, classes[path.split("@")[0]])
            for key, (path, _) in stack.items()
            if path.split("@")[0] in classes
        }


def simplify(gm: fx.GraphModule, node: fx.Node) -> None:
    """Drop `node` if it changes no value; put what is free of memory layout in place of what is not."""
    name, args = op_name(node), node.args
    if name in _CHECKS or (node.op == "call_module" and node.target == "_guards_fn"):
        gm.graph.erase_node(node)
    elif name in _NO_OPS or is_whole_slice(node) or (name == "pad" and not any(_numbers(args[1]))):
        node.replace_all_uses_with(args[0])  # type: ignore[arg-type]
        gm.graph.erase_node(node)
    elif name in ("view", "_unsafe_view"):
        node.target = torch.reshape
    elif name in _NEW and isinstance(value := node.meta.get("val"), Tensor) and all(map(_is_int, value.shape)):
        node.args = (constant(gm, node, value.shape if name.endswith("like") else ()), *args[1:])
        node.kwargs = {}
    elif name in _FACTORIES:
        node.target = _FACTORIES[name]
        node.args, node.kwargs = (constant(gm, node, ()), *args), {}
    elif name in ("to", "_to_copy"):
        unmove(node)


def unmove(node: fx.Node) -> None:
    """Leave a conversion its type, not its device: the network may move after it was captured."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dtype = node.meta["val"].dtype
    if dtype == source.meta["val"].dtype:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
    else:
        node.target, node.args, node.kwargs = torch.ops.aten.to.dtype, (source, dtype), {}


def constant(gm: fx.GraphModule, node: fx.Node, shape: Sequence[int]) -> fx.Node:
    """A node before `node` that fetches an empty tensor of the type of node's result, for what reads no more of it."""
    name, value = f"like_{node.name}", node.meta["val"]
    device = next((p.device for p in gm.parameters()), torch.device("cpu"))
    gm.register_buffer(name, torch.empty(tuple(shape), dtype=value.dtype, device=device))
    with gm.graph.inserting_before(node):
        return gm.graph.get_attr(name)


def is_whole_slice(node: fx.Node) -> bool:
    """Whether `node` is `x[:]` along some dimension."""
    if op_name(node) != "slice":
        return False
    given: dict[str, Any] = dict(zip(("x", "dim", "start", "end", "step"), node.args, strict=False))
    end = given.get("end")
    to_the_end = end is None or (_is_int(end) and end >= _END)
    return given.get("start") in (0, None) and to_the_end and given.get("step", 1) in (1,)


def mark_batch_sizes(graph: fx.Graph) -> None:
    """Mark every scalar that follows from the batch size: units work it out anew from what they read."""
    for node in graph.nodes:
        if op_name(node) == "sym_size":
            node.meta["batch_size"] = True
        elif node.op == "call_function" and getattr(node.target, "__module__", "") in (
            "_operator",
            "builtins",
            "torch",
        ):
            sources = node.all_input_nodes
            node.meta["batch_size"] = bool(sources) and all(source.meta.get("batch_size") for source in sources)


def _numbers(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_int(value: object) -> bool:
    return type(value) is int
