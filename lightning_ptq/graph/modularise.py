"""Functions that compute with fixed weights become modules, so that they are folded and quantized as modules are."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from lightning_ptq.graph.trace import attribute_of, is_inside, is_torch_op, op_name

# The arguments of a function by name, fixed tensors in place of their nodes.
Arguments = dict[str, Any]
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_PLACES = ("stride", "padding", "output_padding", "dilation")
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ATEN_NORM = ("input", "weight", "bias", "running_mean", "running_var")


def modularise(gm: fx.GraphModule, leaf_modules: Sequence[str] = ()) -> None:
    """Make a module of every convolution, product, batch norm and layer norm whose weights are parameters, in place.

    What is inside a module that a pattern of `leaf_modules` names stays as it is.
    """
    for node in list(gm.graph.nodes):
        known = op_name(node) in _FUNCTIONS and (is_torch_op(node) or node.target is operator.matmul)
        if known and not is_inside(node, leaf_modules):
            given, build = arguments_of(node), _FUNCTIONS[op_name(node)][1]
            source = given.pop("input", None)
            given.pop("normalized_shape", None)  # the weight's
            name = name_of(node, given)
            fixed = {key: fixed_value(gm, value) for key, value in given.items()}
            unknown: list[fx.Node] = []
            fx.map_arg(list(fixed.values()), unknown.append)
            module = build(fixed) if isinstance(source, fx.Node) and not unknown else None
            if module is not None:
                call_instead(gm, node, add_module(gm, name, module.eval()), source)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def arguments_of(node: fx.Node) -> Arguments:
    """The node's arguments by name, as torch.nn.functional has them; aten's batch norm has another order."""
    names = _FUNCTIONS[op_name(node)][0]
    if op_name(node) == "batch_norm" and hasattr(node.target, "_schema"):
        names = (*_ATEN_NORM, "training", "momentum", "eps")
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def fixed_value(gm: fx.GraphModule, value: Any) -> Any:
    """The tensor that a node fetches; anything else as it is."""
    fetched = isinstance(value, fx.Node) and value.op == "get_attr"
    return attribute_of(gm, str(value.target)) if fetched else value


def name_of(node: fx.Node, given: Arguments) -> str:
    """What the module will be called: as its weight's owner, or as the module that the call is in."""
    weight = given.get("weight", given.get("other", given.get("running_mean")))
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    owner, _, leaf = str(weight.target).rpartition(".") if isinstance(weight, fx.Node) else ("", "", "")
    if leaf in ("weight", "running_mean") and owner:
        return owner
    if owner and not leaf.startswith("constant_"):
        return f"{owner}.{leaf.removesuffix('_weight')}"
    return stack[-1][0].split("@")[0] if stack and stack[-1][0] else node.name


def add_module(gm: fx.GraphModule, name: str, module: nn.Module) -> str:
    """Put `module` into `gm` under `name`, or under a free name if that is another module's; returns the name."""
    free = name
    while not is_free(gm, free, module):
        free += "_"
    gm.add_submodule(free, module)
    return free


def is_free(gm: fx.GraphModule, name: str, module: nn.Module) -> bool:
    """Whether `name` is not taken, or is that of a bare holder of no other tensors than the module's."""
    holder: Any = gm
    for part in name.split("."):
        holder = getattr(holder, part, None)
        if holder is None:
            return True
    bare = type(holder) is nn.Module and not holder._modules
    return bare and set(holder.state_dict()) <= {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def call_instead(gm: fx.GraphModule, node: fx.Node, name: str, source: fx.Node) -> None:
    """Call the module `name` on `source` in place of `node`."""
    with gm.graph.inserting_before(node):
        call = gm.graph.call_module(name, (source,))
    call.meta = dict(node.meta)
    if op_name(node).startswith("_native"):  # it gives the result and statistics that nobody reads in eval mode
        for reader in list(node.users):
            call.meta["val"] = reader.meta["val"]
            reader.replace_all_uses_with(call)
            gm.graph.erase_node(reader)
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over any number of dimensions. Shape: (N, C, ...) -> the same."""

    def _check_input_dim(self, input: Tensor) -> None:
        """All will do."""


def _convolution(kind: Callable[..., nn.Module], transposed: bool = False) -> Callable[[Arguments], nn.Module | None]:
    def build(given: Arguments) -> nn.Module | None:
        weight, bias, groups = given["weight"], given.get("bias"), given.get("groups", 1)
        options: Arguments = {key: given[key] for key in _PLACES if key in given}
        options = {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in options.items()}
        if not isinstance(weight, nn.Parameter):
            return None  # a fixed filter, such as a blur
        channels, size = (weight.shape[0], weight.shape[1] * groups), tuple(weight.shape[2:])
        options |= {"kernel_size": size, "groups": groups, "bias": False, "device": "meta"}
        layer = kind(*(channels if transposed else channels[::-1]), **options)
        return with_weights(layer, weight, bias)

    return build


def _linear(given: Arguments) -> nn.Module | None:
    weight = given["weight"]
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return None
    return with_weights(nn.Linear(weight.shape[1], weight.shape[0], False, "meta"), weight, given.get("bias"))


def _matmul(given: Arguments) -> nn.Module | None:
    weight = given.get("other", given.get("mat2"))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return None
    return _linear({"weight": nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)})


def _batch_norm(given: Arguments) -> nn.Module | None:
    mean, var, weight = given["running_mean"], given["running_var"], given.get("weight")
    if mean is None or var is None or given.get("training"):
        return None
    norm = BatchNorm(mean.numel(), given.get("eps", 1e-5), affine=weight is not None, device="meta")
    norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, None
    return with_weights(norm, weight, given.get("bias"))


def _layer_norm(given: Arguments) -> nn.Module | None:
    weight = given.get("weight")
    if weight is None:
        return None  # a function without parameters
    return with_weights(nn.LayerNorm(weight.shape, given.get("eps", 1e-5), device="meta"), weight, given.get("bias"))


def with_weights(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """`module` with these very weights."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        module.register_parameter(name, value)
    return module


_FUNCTIONS: dict[str, tuple[tuple[str, ...], Callable[[Arguments], nn.Module | None]]] = {
    "conv1d": (_CONVOLUTION, _convolution(nn.Conv1d)),
    "conv2d": (_CONVOLUTION, _convolution(nn.Conv2d)),
    "conv3d": (_CONVOLUTION, _convolution(nn.Conv3d)),
    "conv_transpose1d": (_TRANSPOSED, _convolution(nn.ConvTranspose1d, transposed=True)),
    "conv_transpose2d": (_TRANSPOSED, _convolution(nn.ConvTranspose2d, transposed=True)),
    "conv_transpose3d": (_TRANSPOSED, _convolution(nn.ConvTranspose3d, transposed=True)),
    "linear": (("input", "weight", "bias"), _linear),
    "matmul": (("input", "other"), _matmul),
    "mm": (("input", "mat2"), _matmul),
    "batch_norm": (_BATCH_NORM, _batch_norm),
    "_native_batch_norm_legit_no_training": ((*_ATEN_NORM, "momentum", "eps"), _batch_norm),
    "layer_norm": (("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm),
}
