"""Count what a GPU would run and what would make the host wait for it, with models that live on the CPU.

Example::

    with counted_work(model) as work:
        measure(model)
    assert work.waits == 1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ALLOCATES = ("empty", "new_empty", "resize")
# Operators whose result has a size or a value that the host must know.
_WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero")
_COPIES_TO_HOST = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)


@dataclass
class Work:
    """What ran outside forward and backward passes.

    Attributes:
        operators: calls of each aten operator that would start kernels on a GPU; a foreach operator
            counts once, however many tensors it has.
        waits_of: calls of each function for which the host would wait for the GPU.
    """

    operators: Counter[str] = field(default_factory=Counter)
    waits_of: Counter[str] = field(default_factory=Counter)

    @property
    def kernels(self) -> int:
        return sum(self.operators.values())

    @property
    def waits(self) -> int:
        return sum(self.waits_of.values())


@contextmanager
def counted_work(*models: torch.nn.Module) -> Iterator[Work]:
    """Count the work of the block of code, without the forward passes of `models` and backward passes."""
    work, pause = Work(), _Pause()
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(patch.object(model, "forward", pause.around(model.forward)))
        for name in ("backward", "grad"):
            function = getattr(torch.autograd, name)
            stack.enter_context(patch.object(torch.autograd, name, pause.around(function)))
        stack.enter_context(_Functions(work, pause))
        stack.enter_context(_Operators(work, pause))
        yield work


class _Pause:
    """Whether nothing is counted, because a forward or a backward pass runs."""

    depth = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def uncounted(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1

        return uncounted


class _Operators(TorchDispatchMode):
    def __init__(self, work: Work, pause: _Pause) -> None:
        super().__init__()
        self.work, self.pause = work, pause

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not self.pause.depth:
            if name in _WAITS or (name.startswith("index") and _has_mask(args)):
                self.work.waits_of[name] += 1
            elif not _is_view(func) and not name.startswith(_ALLOCATES):
                self.work.operators[name] += 1
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Sees what no operator is called for while the tensors are on the CPU."""

    def __init__(self, work: Work, pause: _Pause) -> None:
        super().__init__()
        self.work, self.pause = work, pause

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.pause.depth:
            to_host = func is torch.Tensor.to and "cpu" in map(str, (*args[1:], *kwargs.values()))
            if func in _COPIES_TO_HOST or to_host:
                self.work.waits_of[func.__name__] += 1
        return func(*args, **kwargs)


def _has_mask(args: tuple[Any, ...]) -> bool:
    """Whether an index is a mask, whose number of true elements decides the size of the result."""
    indices = [i for arg in args if isinstance(arg, list | tuple) for i in arg]
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)


def _is_view(func: Any) -> bool:
    results = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in results)
