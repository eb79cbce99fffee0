"""Record the queries, keys and values of every attention that a forward pass computes.

They are recorded in three places:

- at `scaled_dot_product_attention`;
- around `softmax`, whose argument is a product of queries and keys, and whose result is multiplied by values;
- at functions of the model's own Python modules with parameters of these names, such as the kernel of a flash or
  linear attention.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_NAMES = (("query", "key", "value"), ("query_states", "key_states", "value_states"), ("q", "k", "v"))
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"}
_SWAPS = {"transpose", "swapaxes", "swapdims"}


class AttentionInputs(NamedTuple):
    """The inputs of one attention computation.

    Args:
        queries, keys, values: the tensors.
        by_name: whether only the parameter names of a function identify them. Default: False.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    by_name: bool = False


Record = Callable[[AttentionInputs], None]


@contextmanager
def record_attention(model: nn.Module, record: Record) -> Iterator[None]:
    """Call `record` with the inputs of every attention computed inside this context."""
    with _record_functions(model, record), _Recorder(record):
        yield


class _Operands(NamedTuple):
    """The two factors of a product of queries and keys.

    Args:
        left, right: the factors.
        keys_last: whether the last dimension of the product counts keys.
    """

    left: Tensor
    right: Tensor
    keys_last: bool = True


class _Recorder(TorchFunctionMode):
    """Follow products through all functions to a softmax, and the softmax's result to the product with the values."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record
        # By id: the tensor, and the factors that it was computed from. Keeping the tensor alive keeps its id unique.
        self._products: dict[int, tuple[Tensor, _Operands]] = {}
        self._weights: dict[int, tuple[Tensor, _Operands]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if function is functional.scaled_dot_product_attention:
            found = [*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :])]
            self._record(AttentionInputs(*found[:3]))
            return function(*args, **kwargs)
        tensors = [t for a in (*args, *kwargs.values()) for t in _flat(a)]
        out = function(*args, **kwargs)
        weights = next((self._weights[id(t)][1] for t in tensors if id(t) in self._weights), None)
        product = next((self._products[id(t)][1] for t in tensors if id(t) in self._products), None)
        if name in _PRODUCTS and weights is not None:
            others = [t for t in tensors if id(t) not in self._weights]
            if others:
                self._record(AttentionInputs(weights.left, weights.right, others[-1]))
        elif name in _PRODUCTS and isinstance(out, Tensor) and len(tensors) > 1:
            self._products[id(out)] = (out, _operands(args, tensors))
        elif name == "softmax" and product is not None and isinstance(out, Tensor):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            along_keys = (dim % out.ndim == out.ndim - 1) == product.keys_last
            sides = (product.left, product.right) if along_keys else (product.right, product.left)
            self._weights[id(out)] = (out, _Operands(*sides))
        elif isinstance(out, Tensor) and weights is not None:
            self._weights[id(out)] = (out, weights)
        elif isinstance(out, Tensor) and product is not None:
            swapped = name in _SWAPS and {d % out.ndim for d in args[1:3]} == {out.ndim - 2, out.ndim - 1}
            self._products[id(out)] = (out, product._replace(keys_last=product.keys_last != swapped))
        return out


def _operands(args: Any, tensors: list[Tensor]) -> _Operands:
    """Return the factors of a product from the arguments of matmul, baddbmm, einsum and the like."""
    left, right = tensors[-2:]  # the first tensor of baddbmm is added
    if isinstance(args[0], str) and "->" in args[0]:
        (first, _), result = args[0].replace(" ", "").split("->")[0].split(","), args[0].strip()[-1]
        if result in first:
            left, right = right, left
    return _Operands(left, right)


def _flat(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)


@contextmanager
def _record_functions(model: nn.Module, record: Record) -> Iterator[None]:
    """Record the calls of functions with parameters for q, k and v, in the modules that define the model's classes."""
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for name in {cls.__module__ for module in model.modules() for cls in type(module).__mro__}:
            if name.split(".")[0] in ("torch", "builtins", "blockwise_lr") or name not in sys.modules:
                continue
            for attribute, function in list(vars(sys.modules[name]).items()):
                if not inspect.isfunction(function):
                    continue
                if names := _named_parameters(function):
                    replaced.append((sys.modules[name], attribute, function))
                    setattr(sys.modules[name], attribute, _recorded(function, names, record))
        yield
    finally:
        for holder, attribute, function in replaced:
            setattr(holder, attribute, function)


@functools.lru_cache(maxsize=4096)
def _named_parameters(function: Any) -> tuple[str, str, str] | None:
    """Return the parameter names for q, k and v of a function; None if it has none."""
    if function is functional.scaled_dot_product_attention:
        return None
    try:
        known = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return next((names for names in _NAMES if known >= set(names)), None)


def _recorded(function: Any, names: tuple[str, str, str], record: Record) -> Any:
    """Wrap a function so that its q, k and v are recorded."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs).arguments
        found = [bound.get(name) for name in names]
        if all(isinstance(each, Tensor) for each in found):
            queries, keys, values = cast("list[Tensor]", found)
            record(AttentionInputs(queries, keys, values, by_name=True))
        return function(*args, **kwargs)

    return recorded
