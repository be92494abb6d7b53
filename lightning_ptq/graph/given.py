"""The plain network in what a user gives: without wrappers and hooks, its weights in place of what computes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from itertools import chain
from types import FunctionType, MethodType

import torch
from torch import fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_ptq.errors import PTQError

# Hooks that compute a weight anew before each pass, as torch did it before there were parametrizations.
_Computes = WeightNorm | SpectralNorm | BasePruningMethod


def plain(model: nn.Module) -> nn.Module:
    """The network that `model` holds, in eval mode; `model` itself where there is nothing to take off it.

    What torch.compile, DataParallel or DDP wraps is taken out. Where weights are computed anew in each pass (weight and
    spectral norm, pruning, parametrizations), or hooks would be lost, it is a copy: with the weights as they are, and
    without the hooks, of which a warning tells.

    Raises:
        PTQError: TorchScript, no forward or one that no graph would have, something in training mode, a weight without
            a shape or of half precision.
    """
    model = unwrapped(model)
    check_code(model)
    if is_exported(model):
        model = in_eval_mode(model)
    check_state(model)
    hooked = [name or type(model).__name__ for name, _ in unreached_hooks(model)]
    if hooked:
        warnings.warn(
            f"forward hooks of {', '.join(hooked[:3])}{' and others' * (len(hooked) > 3)} are left out: the quantized "
            "network computes without them. What changes a result belongs into a forward.",
            stacklevel=2,
        )
    wrapped = any(unwrapped(child) is not child for module in model.modules() for child in module.children())
    computed = any(old_hooks(module) or parametrize.is_parametrized(module) for module in model.modules())
    return simplified(model) if wrapped or hooked or computed else model


def unwrapped(module: nn.Module) -> nn.Module:
    """What is in a wrapper that computes the same as it, or in several."""
    while True:
        inside = getattr(module, "_orig_mod", None)  # of torch.compile, whose class is nowhere public
        if isinstance(module, DataParallel | DistributedDataParallel):
            inside = module.module
        if not isinstance(inside, nn.Module):
            return module
        module = inside


def check_code(model: nn.Module) -> None:
    """Raise `PTQError` for TorchScript, for a module without a forward, and for a forward that no graph would have."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            which = f"module {name!r}" if name else "the model"
            raise PTQError(f"{which} is TorchScript, whose code can't be taken apart. Give the Python model it is of.")
        if unwrapped(module) is module and _loses_forward(name, module):
            which = f"module {name!r} ({type(module).__name__})" if name else type(model).__name__
            raise PTQError(
                f"{which} has a forward that was set on it from outside, without which the quantized network would "
                "compute. Write it into a class."
            )
    # A LightningModule has one that only says so.
    code = getattr(getattr(model, "forward", None), "__qualname__", "")
    if code in ("_forward_unimplemented", "LightningModule.forward"):
        inside = ", ".join(name for name, _ in model.named_children())
        raise PTQError(
            f"{type(model).__name__} has no forward. Give the network in it: it holds {inside or 'nothing'}."
        )


def _loses_forward(name: str, module: nn.Module) -> bool:
    """Whether a graph would be without the forward that was set on `module`, or would have it of the network given."""
    own = vars(module).get("forward")
    if own is None:
        return False
    code = getattr(own, "__func__", own)
    held = [cell.cell_contents for cell in getattr(code, "__closure__", None) or ()]
    if isinstance(module, fx.GraphModule) or any(isinstance(getattr(x, "__self__", x), nn.Module) for x in held):
        return True  # copies have the class's forward, or run the layers that it holds
    is_method = isinstance(own, MethodType) and own.__self__ is module and isinstance(code, FunctionType)
    return _is_whole(name, module) and (bool(name) or not is_method)


def check_state(model: nn.Module) -> None:
    """Raise `PTQError` for modules in training mode, lazy weights, and weights of half precision."""
    for name, module in model.named_modules():
        # A wrapper's own flag says nothing of what is in it.
        if module.training and unwrapped(module) is module:
            which = f"module {name!r} ({type(module).__name__})" if name else type(model).__name__
            raise PTQError(
                f"{which} is in training mode; a teacher is frozen, with fixed batch-norm statistics and no dropout. "
                "Call model.eval() first."
            )
    lazy = [name for name, x in chain(model.named_parameters(), model.named_buffers()) if is_lazy(x)]
    if lazy:
        raise PTQError(
            f"{lazy[0]!r} has no shape yet: a lazy module takes it from the first image. Give the trained network, or "
            "call it once and load its weights."
        )
    half = [(name, p.dtype) for name, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    if half:
        raise PTQError(f"{half[0][0]!r} is in {str(half[0][1]).removeprefix('torch.')}. Call model.float() first.")


def is_exported(model: nn.Module) -> bool:
    """Whether `model` is the module of a program that `torch.export` made."""
    return isinstance(model, fx.GraphModule) and "forward" not in vars(model) and "eval" in vars(model)


def in_eval_mode(program: nn.Module) -> nn.Module:
    """A copy of an exported program's module that says it is in eval mode: its own `eval` refuses to.

    Raises:
        PTQError: it computes as in training, which is fixed for good.
    """
    assert isinstance(program, fx.GraphModule)
    # Their argument that is true in training: (x, weight, bias, mean, variance, training, ...) and (x, p, training).
    # With a decomposed program's names for them.
    flags = {"batch_norm": 5, "dropout": 2, "native_dropout": 2}
    flags |= dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional"), 5)
    for node in program.graph.nodes:
        at = flags.get(getattr(node.target, "__name__", "").split(".")[0])
        if at is not None and node.args[at : at + 1] == (True,):
            raise PTQError(f"the exported program computes {node.name!r} as in training. Export model.eval() instead.")
    copied = deepcopy(program)
    for module in copied.modules():
        module.training = False
    return copied


def unreached_hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with forward hooks that no graph would have: of the model itself, and of torch's own layers."""
    for name, module in model.named_modules():
        before = [h for h in module._forward_pre_hooks.values() if not isinstance(h, _Computes)]
        if _is_whole(name, module) and (before or module._forward_hooks):
            yield name, module


def _is_whole(name: str, module: nn.Module) -> bool:
    """Whether a graph knows the code of `module` by its class alone: the model itself, and torch's own layers."""
    return not name or (type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential))


def old_hooks(module: nn.Module) -> list[_Computes]:
    """The hooks that compute weights of `module` itself."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Computes)]


@torch.no_grad()
def simplified(model: nn.Module) -> nn.Module:
    """A copy of `model` as it is described in `plain`."""
    for module in model.modules():
        for hook in old_hooks(module):
            hook(module, None)  # the same weight, without the history that can't be copied
    copied = deepcopy(model)
    for parent in list(copied.modules()):
        for name, child in list(parent._modules.items()):  # named_children would leave out a second name
            if child is not None:
                setattr(parent, name, unwrapped(child))
    for module in copied.modules():
        for hook in old_hooks(module):
            hook.remove(module)
            module._forward_pre_hooks.pop(next(key for key, h in module._forward_pre_hooks.items() if h is hook))
            if isinstance(hook, SpectralNorm):
                module._load_state_dict_pre_hooks.clear()  # it would look for what the weight was computed from
        if parametrize.is_parametrized(module):
            fix_parametrized(module)
    for _, module in unreached_hooks(copied):
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return copied


def fix_parametrized(module: nn.Module) -> None:
    """Make a parametrized module one of its class before, with the values that its tensors have.

    torch's own way back changes the class that the module was made one of, which its copies share.
    """
    assert isinstance(module.parametrizations, nn.ModuleDict)
    values = {name: nn.Parameter(getattr(module, name).contiguous()) for name in module.parametrizations}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, value)
