"""Operations as they were done, to be done again without the Python that called them.

A tape sees what reaches torch's kernels, behind autograd: a step's forward and backward pass are some hundred calls.
Tensors that were there before, such as parameters and minibatches, are read again where they lie, so that what changes
from step to step has to be in their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

# What these give is what they are given, in the same memory.
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
# Whoever asked for these may have gone another way for their result.
_UNFORESEEABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_LITERALS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class Tape(TorchDispatchMode):
    """Inside `with tape:` every operation is done and taken down.

    Attributes:
        faithful: nothing was seen whose result Python may have gone by, or that may have changed what was there before.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.faithful = True
        self._graph = fx.Graph()
        self._nodes = WeakTensorKeyDictionary()  # of tensors, which live no longer for being on a tape
        self._found: dict[fx.Node, Any] = {}  # what was there before, by the placeholder for it
        self._there: set[int] = set()  # the memory of that
        self._paused = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._paused:
            return result
        self.faithful &= self._is_foreseeable(function, args, kwargs or {})
        if function in _SAME:
            self._nodes[result] = self._argument(args[0])
        else:
            self._add(function, args, kwargs or {}, result)
        return result

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, taken down as one operation whatever it does inside; a function of a module."""
        self._paused = True
        try:
            result = function(*args)
        finally:
            self._paused = False
        self._add(function, args, {}, result)
        return result

    def again(self, results: Any) -> Callable[[], Any]:
        """A function that does all of it again, and gives what `results`, a tree of tensors, are then.

        It computes without gradients, and holds nothing longer than an operation needs it.
        """
        self._graph.output(tree_map(self._argument, results))
        code = self._graph.python_code("self")
        names = dict(code.globals)
        exec(code.src, names)  # not a GraphModule: torch.fx keeps the source of each for good
        forward, found = names["forward"], [self._found[x] for x in self._graph.nodes if x.op == "placeholder"]
        return torch.no_grad()(lambda: forward(None, *found))

    def _add(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        node = self._graph.call_function(function, *tree_map(self._argument, (args, kwargs)))
        if isinstance(result, Tensor):
            self._nodes[result] = node
        elif isinstance(result, tuple | list):
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._nodes[part] = self._graph.call_function(getitem, (node, i))

    def _is_foreseeable(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether Python can't have gone by the result, nor `function` have changed what was there before."""
        if function._schema.is_mutable:
            given = {x.name: value for x, value in zip(function._schema.arguments, args, strict=False)} | kwargs
            written = [x.name for x in function._schema.arguments if x.alias_info is not None and x.alias_info.is_write]
            if any(self._was_there(x) for x in tree_leaves([given.get(name) for name in written])):
                return False
        if function is torch.ops.aten.index.Tensor:  # its shape depends on numbers if a mask is among its indices
            return not any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        return not _UNFORESEEABLE.intersection(function.tags)

    def _was_there(self, x: Any) -> bool:
        return isinstance(x, Tensor) and (x not in self._nodes or x.untyped_storage()._cdata in self._there)

    def _argument(self, x: Any) -> Any:
        """What stands for `x` on the tape."""
        if isinstance(x, _LITERALS):
            return x
        if isinstance(x, Tensor) and x in self._nodes:
            return self._nodes[x]
        with self._graph.inserting_before():  # at the beginning
            node = self._graph.placeholder(f"found_{len(self._found)}")
        self._found[node] = x
        if isinstance(x, Tensor):
            self._nodes[x] = node
            self._there.add(x.untyped_storage()._cdata)
        return node


class Watched:
    """A module whose functions are operations of a tape."""

    def __init__(self, tape: Tape, module: Any) -> None:
        self._tape, self._module = tape, module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        return lambda *args: self._tape.call(function, *args)


def recording() -> Tape | Literal[False] | None:
    """The tape that takes down this thread's operations, None if there is none; False if another mode sees them too."""
    modes = torch._C._len_torch_dispatch_stack()
    if not modes:
        return None
    mode = torch._C._get_dispatch_stack_at(0)
    return mode if modes == 1 and isinstance(mode, Tape) else False
