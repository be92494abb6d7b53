"""Symbolic trace of a model: one tensor in, one tensor out, or an error that names the user's line."""

from __future__ import annotations

import inspect
import operator
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn.modules.activation import MultiheadAttention

from lightning_ptq.errors import PTQError
from lightning_ptq.graph.pack import pack_outputs

# Frames from here are never the line that the user can change.
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_STDLIB = sysconfig.get_path("stdlib")


def words(text: str) -> frozenset[str]:
    """The set of names in a readable list."""
    return frozenset(text.split())


# What `x += y` and the like call -> the operator that leaves x alone. `@=` is not among them: it makes a new tensor.
IN_PLACE_OPERATORS: dict[Any, Callable[..., Any]] = {
    getattr(operator, f"i{name}"): getattr(operator, f"__{name}__")
    for name in words("add sub mul truediv floordiv mod pow and or xor")
}

# What a node computes. "opaque": not known, such as a user's wrapped function; only tensors can cross a cut.
Kind = Literal["tensor", "tuple", "scalar", "opaque"]

_TUPLE_OPS = words(
    "chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind unsafe_chunk unsafe_split topk sort "
    "kthvalue mode cummax cummin aminmax var_mean std_mean frexp meshgrid broadcast_tensors unique unique_consecutive "
    "multi_head_attention_forward max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"
)
_TUPLE_WITH_DIM = frozenset(("max", "min", "median", "nanmedian"))
_SCALAR_OPS = words(
    "size dim ndimension numel stride item tolist is_floating_point is_complex get_device element_size _assert "
    "storage_offset is_contiguous data_ptr nelement sym_size sym_numel sym_stride"
)
_TENSOR_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))


class TraceError(PTQError):
    """Code that fx cannot trace; `path` are the modules around it, outermost first."""

    def __init__(self, message: str, path: Sequence[str]) -> None:
        super().__init__(message)
        self.path = tuple(path)


class InPlaceProxy(fx.Proxy):
    """A proxy for which `x += y` overwrites x, as it does a tensor; fx's own records `x + y`."""


def _in_place(target: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    def overwrite(self: InPlaceProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {}, name=plain.__name__)

    return overwrite


for _target, _plain in IN_PLACE_OPERATORS.items():
    setattr(InPlaceProxy, f"__{_target.__name__}__", _in_place(_target, _plain))


class ModuleTracer(fx.Tracer):
    """fx tracer that keeps whole the modules whose qualified name matches a pattern, and knows where it is."""

    def __init__(self, leaf_modules: Sequence[str] = ()) -> None:
        super().__init__()
        self.leaf_modules = tuple(leaf_modules)
        self.path: list[str] = []  # modules being traced, outermost first; kept as it was when tracing fails

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the node's value while tracing."""
        return InPlaceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a pattern, or torch.nn itself, makes this module one node."""
        if any(fnmatchcase(module_qualified_name, pattern) for pattern in self.leaf_modules):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace through `m`, remembering its name."""
        depth = len(self.path)
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        del self.path[depth:]
        return result

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder; every optional argument keeps its default, as in `model(x)`."""
        parameters = list(inspect.signature(inspect.unwrap(root_fn)).parameters.values())[1:]
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if len(required) > 1 or any(p.kind == p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
            raise PTQError(
                f"{type(self.root).__name__}.forward needs {len(required)} arguments ({', '.join(required)}); "
                "a model to quantize takes one tensor. Wrap it in a module that supplies the others."
            )
        name = positional[0].name if positional else "x"
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]


def trace(model: nn.Module, leaf_modules: Sequence[str] = (), is_part: bool = False) -> fx.GraphModule:
    """Trace a copy of `model` in eval mode; nodes carry `meta["nn_module_stack"]`.

    Args:
        model: takes one tensor and returns one tensor, or a dict with one; it is not modified.
        leaf_modules: patterns of qualified module names to keep whole (and in float).
        is_part: of another model, which reads all of its outputs: they are returned packed, not the main one only.

    Raises:
        PTQError: a pattern without a match, code that fx cannot trace (with the line), several inputs or a dict of
            them, or an output that is not one tensor.
    """
    check_leaf_modules(model, leaf_modules)
    tracer = ModuleTracer(leaf_modules)
    root = deepcopy(model).requires_grad_(False)
    if own := vars(root).pop("forward", None):  # a method, as `given` has seen to; fx takes the class's
        root.__class__ = type(type(root).__name__, (type(root),), {"forward": own.__func__})
    try:
        graph = tracer.trace(root)
    except PTQError:
        raise
    except Exception as error:
        raise TraceError(describe_failure(model, tracer.path, error), tracer.path) from error
    (image,) = graph.find_nodes(op="placeholder")
    keys = [node.args[1] for node in image.users if op_name(node) == "getitem" and isinstance(node.args[1], str)]
    if keys:
        raise PTQError(
            f"{type(model).__name__}.forward takes a dict, of which it reads {keys[0]!r}; a model to quantize takes "
            "one tensor. Wrap it in a module that makes the dict."
        )
    gm = fx.GraphModule(root, graph)
    set_output(model, gm, graph.output_node().args[0], is_part)
    return gm


def check_leaf_modules(model: nn.Module, patterns: Sequence[str]) -> None:
    """Raise `PTQError` for a pattern that names no module."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PTQError(
                f"leaf_modules: pattern {pattern!r} names no module of {type(model).__name__}. "
                "Use qualified names as model.named_modules() gives them."
            )


_FEW_CHANNELS = 16
# Operations that need a certain memory layout or tell of it.
_LAYOUT_OPS = ("view", "view_as", "as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr")


def any_layout_will_do(gm: fx.GraphModule) -> bool:
    """Whether no operation depends on how its tensors lie in memory, as far as that can be known.

    What users keep whole or wrap may do anything with a tensor.
    """
    if any(corrupts_memory(module) for module in gm.modules()):
        return False
    return "opaque" not in node_kinds(gm).values() and not any(op_name(n) in _LAYOUT_OPS for n in gm.graph.nodes)


def corrupts_memory(module: nn.Module) -> bool:
    """Whether the CPU's backward pass of this convolution, channels last, writes past its memory: torch 2.11 to 2.14 do
    so for strided 1x1 kernels of few input channels ("double free or corruption", seen with 2 to 12)."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < _FEW_CHANNELS
    )


# The entries of a dict of outputs that are taken for the main one, in this order; else its first.
_MAIN_OUTPUTS = ("out", "logits", "prediction", "output")


def pick_output(output: Any) -> Any:
    """What a quantized network returns where a model returns `output`: of a dict its main entry."""
    if isinstance(output, Mapping) and output:
        return output[next((key for key in _MAIN_OUTPUTS if key in output), next(iter(output)))]
    return output


def set_output(model: nn.Module, gm: fx.GraphModule, returned: Any, is_part: bool) -> None:
    """Make `gm` return one tensor: the main one of what the model `returned`, or, of a part, all.

    Raises:
        PTQError: the model returns something that is known not to be that.
    """
    gm.graph.output_node().args = (returned if is_part else pick_output(returned),)
    if is_part:
        pack_outputs(gm)
    output = gm.graph.output_node().args[0]
    kind = node_kinds(gm)[output] if isinstance(output, fx.Node) else type(output).__name__.removeprefix("immutable_")
    if kind not in ("tensor", "opaque"):
        raise PTQError(
            f"{type(model).__name__} returns a {kind}; a model to quantize returns one tensor, or a dict of them. "
            "Wrap it in a module that picks the output."
        )
    gm.recompile()


def describe_failure(model: nn.Module, path: Sequence[str], error: Exception) -> str:
    """Message for code that fx cannot trace: the user's line, the reason, the way out."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_user_file(f.filename)]
    where = f"\n  {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    way_out = "mark the function that holds this line with torch.fx.wrap"
    if path:
        way_out = f"keep the module whole (and in float) with leaf_modules=[{path[-1]!r}], or {way_out}"
    else:
        way_out = f"move the line into a submodule and name that in leaf_modules=[...], or {way_out}"
    reason = " ".join(str(error).split())
    return f"{type(model).__name__} cannot be traced.{where}\n  {type(error).__name__}: {reason}\nEither {way_out}."


def is_user_file(filename: str) -> bool:
    """Whether a stack frame's file is neither torch, this library, the standard library nor generated code."""
    if filename.startswith("<"):
        return False
    path = Path(filename)
    if any(path.is_relative_to(library) for library in _LIBRARIES):
        return False
    installed = "site-packages" in path.parts or "dist-packages" in path.parts
    return installed or not path.is_relative_to(_STDLIB)


def node_kinds(gm: fx.GraphModule) -> dict[fx.Node, Kind]:
    """Kind of every node that has a value."""
    kinds: dict[fx.Node, Kind] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            kinds[node] = module_kind(gm.get_submodule(str(node.target)))
        elif node.op in ("call_function", "call_method"):
            kinds[node] = op_kind(node, kinds)
        else:
            kinds[node] = "tensor"
    return kinds


def module_kind(module: nn.Module) -> Kind:
    """Kind of a module's output; only torch.nn's and this library's own are known."""
    if type(module).__module__.split(".")[0] not in ("torch", "lightning_ptq"):
        return "opaque"
    if isinstance(module, MultiheadAttention | nn.RNNBase) or getattr(module, "return_indices", False):
        return "tuple"
    return "tensor"


def op_kind(node: fx.Node, kinds: Mapping[fx.Node, Kind]) -> Kind:
    """Kind of a function's or method's result, from its name and the kinds of its inputs."""
    inputs = [kinds[source] for source in node.all_input_nodes]
    name, first = op_name(node), inputs[0] if inputs else "scalar"
    module = getattr(node.target, "__module__", None)
    if node.op == "call_function" and module in ("builtins", "_operator", "math"):
        if name == "getattr" and first == "tensor":
            return "tensor" if node.args[1] in _TENSOR_ATTRIBUTES else "scalar"
        if name == "getattr":
            return "scalar" if first == "scalar" else "opaque"
        if name == "getitem":
            if first == "tuple":
                return "tensor" if isinstance(node.args[1], int) else "tuple"
            return first
        if module == "_operator" and "tensor" in inputs:
            return "tensor"
        return "opaque" if "opaque" in inputs or "tuple" in inputs else "scalar"
    if not is_torch_op(node):
        return "opaque"
    if node.op == "call_method" and first != "tensor":
        return "scalar" if first == "scalar" else "opaque"
    if name in _SCALAR_OPS:
        return "scalar"
    if name in _TUPLE_OPS or node.kwargs.get("return_indices") or node.kwargs.get("return_inverse"):
        return "tuple"
    if name in _TUPLE_WITH_DIM and ("dim" in node.kwargs or not all(isinstance(a, fx.Node) for a in node.args)):
        return "tuple"
    return "tensor"


def op_name(node: fx.Node) -> str:
    """Bare name of a function or method node, such as "relu"; empty for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    # aten's are called "add.Tensor", by their overload.
    return str(getattr(node.target, "__name__", "")).split(".")[0] if node.op == "call_function" else ""


def is_torch_op(node: fx.Node) -> bool:
    """Whether `node` calls a tensor method or a function of torch itself, not one that the user wrapped."""
    if node.op == "call_method":
        return True
    module = getattr(node.target, "__module__", None)
    return node.op == "call_function" and (module is None or module.split(".")[0] == "torch")


def is_inside(node: fx.Node, patterns: Sequence[str]) -> bool:
    """Whether `node` was called in a module that one of `patterns` names."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)


def attribute_of(root: nn.Module, name: str) -> Any:
    """Parameter, buffer or constant with this qualified name."""
    parent, _, leaf = name.rpartition(".")
    return getattr(root.get_submodule(parent), leaf)


def has_attribute(root: nn.Module, name: str) -> bool:
    """Whether the qualified `name` is taken in `root`."""
    parent, _, leaf = name.rpartition(".")
    return hasattr(root.get_submodule(parent), leaf)


def free_name(root: nn.Module, name: str) -> str:
    """`name`, or one like it that is not taken."""
    while has_attribute(root, name):
        name += "_"
    return name
