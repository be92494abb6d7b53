"""Which tensors and layers of a folded graph are quantized, to how many bits, and what stays in float and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ptq.config import LayerBits, QuantConfig
from lightning_ptq.errors import PTQError
from lightning_ptq.graph.hardware import kernels, moved, origin, result
from lightning_ptq.graph.trace import free_name, is_inside, is_torch_op, node_kinds, op_name, words
from lightning_ptq.layers import is_quantizable
from lightning_ptq.quantizers import ActQuantizer, LogQuantizer

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
_NORM_OPS = ("layer_norm", "group_norm", "rms_norm", "batch_norm", "instance_norm")
# Products of two tensors that both follow from the image; their inputs are quantized.
_PRODUCTS = words("matmul mm bmm einsum")
_MATMUL_OPS = _PRODUCTS | words("addmm baddbmm bilinear scaled_dot_product_attention multi_head_attention_forward")
_MODULE_OPS = words("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")


@dataclass(frozen=True)
class FloatOp:
    """Something with parameters, or a product, that stays in float, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """The graph with quantizer nodes, and what is quantized in it.

    Attributes:
        gm: the float network; its quantizer nodes call `ActQuantizer`s.
        layers: quantizable layer node -> its bits; `act_bits` are those of the quantizer that it reads.
        products: nodes that multiply two activations -> their names.
        quantizers: quantizer nodes.
        reads: layer node -> name of the quantizer of what it reads.
        gives: layer node -> name of the quantizer of its output, or of what a ReLU, a pool or a view makes of it.
    """

    gm: fx.GraphModule
    layers: dict[fx.Node, LayerBits]
    products: dict[fx.Node, str]
    quantizers: frozenset[fx.Node]
    reads: dict[fx.Node, str]
    gives: dict[fx.Node, str]


def place_quantizers(gm: fx.GraphModule, config: QuantConfig, leaf_modules: Sequence[str] = ()) -> Placement:
    """Insert one `ActQuantizer` after the producer of every tensor that a quantizable layer or a product reads.

    All readers of that tensor, residual additions and pools included, read the quantized one. With placement "hardware"
    there are more of them (`hardware.py`). Torch's layers and products in modules that a pattern of `leaf_modules`
    names stay float.

    Raises:
        PTQError: nothing to quantize, or an override that matches no layer.
    """
    nodes = [n for n in gm.graph.nodes if n.op == "call_module" and is_quantizable(gm.get_submodule(str(n.target)))]
    for node in nodes:
        kind = type(gm.get_submodule(str(node.target)))
        # A class of the user's own is named to be one node, and has a twin to be quantized; torch's are nodes anyhow.
        if is_inside(node, leaf_modules) and kind.__module__.split(".")[0] == "torch":
            node.meta["float_reason"] = f"{kind.__name__} is named by leaf_modules"
    nodes = [node for node in nodes if "float_reason" not in node.meta]
    if not nodes:
        raise PTQError(
            "the model has no layer that can be quantized: no convolution or product with parameters outside of "
            "leaf_modules."
        )
    found = products_of_activations(gm)
    products = {node: product_name(node) for node in found if not is_inside(node, leaf_modules)}
    config.check_overrides([*(str(node.target) for node in nodes), *products.values()])
    first, last = edge_layers(nodes, gm.graph.nodes)
    wanted = {n: config.bits_of(str(n.target), first=n in first, last=n in last) for n in nodes}
    wanted |= {n: config.bits_of(name, first=False, last=False) for n, name in products.items()}

    hardware = config.placement == "hardware"
    needs: dict[fx.Node, list[LayerBits]] = {}  # producer -> what its readers ask for
    read: dict[fx.Node, list[fx.Node]] = {}  # layer or product -> producers of what it reads
    for node in gm.graph.nodes:
        if node in wanted:
            read[node] = [origin(gm, s) if hardware else s for s in dict.fromkeys(node.all_input_nodes)]
            for producer in read[node]:
                needs.setdefault(producer, []).append(wanted[node])
    for producer in around_kernels(gm, list(wanted)) if hardware else ():
        needs.setdefault(producer, []).append(LayerBits(config.weight_bits, config.act_bits))
    mixed = config.average_bits is not None
    bits = {producer: bits_read(readers, mixed) for producer, readers in needs.items()}
    outputs = {node: moved(gm, node) for node in nodes}
    inserted: dict[fx.Node, fx.Node] = {}
    for producer in needs:
        kind = LogQuantizer if config.softmax == "log2" and is_softmax(gm, producer) else ActQuantizer
        inserted[producer] = insert_quantizer(gm, producer, kind(bits[producer], config.act_symmetric))
    gm.recompile()
    # What a product reads too is not one layer's to choose.
    shared = {producer for product in products for producer in read[product]}
    layers = {
        n: replace(
            wanted[n],
            act_bits=bits[read[n][0]],
            fixed=wanted[n].fixed | ({"act_bits"} if shared.intersection(read[n]) else set()),
        )
        for n in nodes
    }
    reads = {n: str(inserted[read[n][0]].target) for n in nodes}
    behind = {n: next((x for x in found if x in inserted), None) for n, found in outputs.items()}
    gives = {n: str(inserted[x].target) for n, x in behind.items() if x is not None}
    return Placement(gm, layers, products, frozenset(inserted.values()), reads, gives)


def bits_read(readers: Sequence[LayerBits], mixed: bool) -> int:
    """Bits of an activation: the most that one of its readers asks for.

    In mixed precision only readers count for which `edges` or `overrides` give it, where there are any.
    """
    given = [bits.act_bits for bits in readers if "act_bits" in bits.fixed] if mixed else []
    return max(given or [bits.act_bits for bits in readers])


def around_kernels(gm: fx.GraphModule, layers: Sequence[fx.Node]) -> list[fx.Node]:
    """Producers of what integer kernels read and give, but for the network's output."""
    dependent = depends_on_image(gm)
    others = kernels(gm, dependent)
    found = [origin(gm, s) for node in others for s in node.all_input_nodes if s in dependent]
    found += [result(gm, node) for node in (*layers, *others)]
    returned = {origin(gm, node) for node in gm.graph.output_node().all_input_nodes}
    kinds = node_kinds(gm)
    return [node for node in dict.fromkeys(found) if kinds[node] == "tensor" and node not in returned]


def depends_on_image(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose value follows from the image."""
    dependent: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" or any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
    return dependent


def products_of_activations(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that multiply two matrices which both depend on the image."""
    dependent = depends_on_image(gm)
    return [
        node
        for node in gm.graph.nodes
        if op_name(node) in _PRODUCTS
        and node.op in ("call_function", "call_method")
        and len(factors(node)) == 2
        and all(factor in dependent for factor in factors(node))
    ]


def factors(node: fx.Node) -> list[fx.Node]:
    """The tensors that a product reads, one twice if it is multiplied by itself."""
    found: list[fx.Node] = []
    fx.map_arg(node.args, found.append)
    return found


def product_name(node: fx.Node) -> str:
    """What a product is called in overrides and plans: the module that it is in, and its own name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].split("@")[0] if stack else ""
    return f"{path}.{node.name}" if path else node.name


def edge_layers(layers: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Layers without a layer before them on any path, and layers without one after them."""
    layers, nodes = set(layers), list(nodes)
    after: set[fx.Node] = set()  # nodes that a layer's output reaches
    for node in nodes:
        if any(source in layers or source in after for source in node.all_input_nodes):
            after.add(node)
    before: set[fx.Node] = set()  # nodes whose output reaches a layer
    for node in reversed(nodes):
        if any(reader in layers or reader in before for reader in node.users):
            before.add(node)
    return layers - after, layers - before


def is_softmax(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` gives what a softmax does."""
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), nn.Softmax)
    return op_name(node) == "softmax"


def insert_quantizer(gm: fx.GraphModule, producer: fx.Node, quantizer: ActQuantizer) -> fx.Node:
    """Put a node that calls `quantizer` right after `producer`; it belongs to the same modules."""
    name = free_name(gm, f"act_{producer.name}")
    gm.add_submodule(name, quantizer)
    with gm.graph.inserting_after(producer):
        node = gm.graph.call_module(name, (producer,))
    node.meta = dict(producer.meta)
    producer.replace_all_uses_with(node, delete_user_cb=lambda reader: reader is not node)
    return node


def float_ops(placement: Placement, islands: Sequence[str] = ()) -> tuple[FloatOp, ...]:
    """Every operation with parameters, and every product, that stays in float, in order, each once; `islands` too."""
    gm = placement.gm
    found: dict[str, FloatOp] = {}
    for node in gm.graph.nodes:
        reason = node.meta.get("float_reason") or why_float(gm, node)
        if node.op == "call_module" and str(node.target) in islands:
            kind = type(gm.get_submodule(str(node.target))).__name__
            reason = f"{kind} is kept whole, since neither torch.fx nor torch.export can follow it"
        quantized = node in placement.layers or node in placement.products or node in placement.quantizers
        if reason and not quantized:
            name = str(node.target) if node.op in ("call_module", "get_attr") else node.name
            name = node.meta.get("parameter", name)  # what the model calls what is a copy of a layer's
            found.setdefault(name, FloatOp(name, reason))
    return tuple(found.values())


def why_float(gm: fx.GraphModule, node: fx.Node) -> str:
    """Why this node stays in float if it is not quantized; empty for what computes without parameters."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if next(module.parameters(), None) is None:
            return ""
        kind = type(module).__name__
        if isinstance(module, _NORMS):
            return f"{kind} is kept in float"
        if type(module).__module__.split(".")[0] != "torch":
            return f"{kind} is kept whole by leaf_modules"
        return f"{kind} is not supported and stays in float"
    if node.op == "get_attr":
        read = [reader for reader in node.users if op_name(reader) not in (*_NORM_OPS, *_MODULE_OPS)]
        value = parameter_of(gm, str(node.target))
        if not read or value is None or str(node.target).startswith("constant_"):  # folded: no parameter of the model's
            return ""
        return f"parameter used directly by {read[0].name!r} stays in float"
    name = op_name(node)
    if node.op == "call_function" and is_torch_op(node):
        if name in _NORM_OPS:
            return f"F.{name} is kept in float"
        if name in _MODULE_OPS:
            return f"F.{name} is not quantized: its weight is no parameter, or leaf_modules names its module"
    return f"{name} is not quantized" if name in _MATMUL_OPS else ""


def parameter_of(gm: fx.GraphModule, name: str) -> nn.Parameter | None:
    """The parameter with this qualified name; None for a buffer or constant."""
    parent, _, leaf = name.rpartition(".")
    return gm.get_submodule(parent)._parameters.get(leaf)
