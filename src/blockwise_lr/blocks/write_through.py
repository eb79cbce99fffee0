"""Tensors that write through: in-place writes into a split weight reach its parts.

A split weight is computed from its parts on each read, so a write into a plain result would be lost. Other code does
write into weights: PEFT merges an adapter by `layer.weight.data += delta`, initialisation calls
`nn.init.normal_(layer.weight)`, and weight averaging writes into the tensors of `state_dict()`. All of these work on a
:class:`WriteThroughWeight` as they do on a parameter.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

_IN_PLACE = re.compile(r"__(i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)|setitem)__")
_BASE = Tensor._base.__get__  # type: ignore[union-attr]  # its result stays a plain tensor
_REGISTERS_HOOK = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}


class WeightParts(Protocol):
    """The parts of a split weight."""

    name: str

    def tensors(self) -> Sequence[Tensor]:
        """Return the current parts."""

    def whole(self) -> Tensor:
        """Return the weight, computed from the parts without gradients."""

    def assign(self, value: Tensor) -> None:
        """Write the values of a whole weight into the parts."""

    def require_grad(self, flag: bool) -> None:
        """Set `requires_grad` of the parts."""


class WriteThroughWeight(Tensor):
    """A split weight, or a view of one, whose in-place writes are copied to the parts.

    It behaves like the parameter. In-place methods, `nn.init`, indexed assignment, `.data` and its assignment, views,
    `out=` and `torch._foreach_*` change the parts. If the parts have changed, they are read again. Copies, pickles and
    the results of computations are plain tensors. A write that cannot reach the parts is an error.
    """

    _parts: WeightParts
    _whole: Tensor  # the computed weight's `.data`, whose storage all views share
    _versions: list[Any]
    _represents_parameter: bool  # True for module.weight, False for its views and for state_dict entries
    _is_view_of_weight: bool

    @property
    def _is_param(self) -> bool:
        """False: `isinstance(weight, nn.Parameter)` reads this flag, and a split weight is not a parameter."""
        return False

    @_is_param.setter
    def _is_param(self, flag: bool) -> None:
        """Become an independent parameter: only `nn.Parameter(weight)` sets this flag."""
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        self.data = self.data.clone()

    # __torch_function__ does not see this method.
    def set_(self, source: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Take the values of a tensor, like an assignment to `data`."""
        if not isinstance(source, Tensor) or args or kwargs:
            raise RuntimeError(
                f"{self._parts.name} is split and has no memory of its own to replace: write values into it, with copy_"
            )
        self.data = source
        return self

    @classmethod
    @_disable_dynamo
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a torch function: refresh the weights among its arguments first, and copy writes to the parts after."""
        kwargs = kwargs or {}
        weights = [each for each in _tensors((args, kwargs)) if isinstance(each, WriteThroughWeight)]
        first = args[0] if args and isinstance(args[0], WriteThroughWeight) else None
        with torch._C.DisableTorchFunctionSubclass():
            if first is not None and (handled := _special(first, func, args, kwargs)) is not _ORDINARY:
                return handled
            writes = _writes(func, kwargs)
            _check_not_recorded(func, args, writes)
            for each in weights:
                _refresh(each, always=writes)
            before = [_version(each) for each in weights]
            out = func(*args, **kwargs)
            targets = {id(each) for each in _tensors((args[:1], kwargs.get("out")))} if writes else set()
            for each, version in zip(weights, before):
                if version != _version(each) or id(each) in targets:
                    _write_back(each)
            return out if func == _BASE else _views(out, weights)


def write_through(value: Tensor, parts: WeightParts, *, parameter: bool) -> Tensor:
    """Return a computed weight whose writes reach its parts.

    Args:
        value: the weight, just computed from the parts.
        parts: the parts to write to.
        parameter: whether the result represents the parameter itself, such as `layer.weight`. Setting its
            `requires_grad` then sets that of the parts, and registering a gradient hook raises an error.

    Returns:
        A :class:`WriteThroughWeight`; or `value` itself where writes cannot be tracked: inside torch.compile, inside
        a transform of torch.func, or if `value` is of a subclass of Tensor.
    """
    if torch.compiler.is_compiling() or type(value) is not Tensor:
        return value
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return value
    with torch.inference_mode(False), torch.set_grad_enabled(value.requires_grad):
        weight = value.as_subclass(WriteThroughWeight)
    return _attach_parts(weight, parts, value.data, parameter=parameter, view=False)


# Functions that need special treatment --------------------------------------------------------------------

_ORDINARY = object()


def _special(weight: WriteThroughWeight, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Handle functions that need special treatment, and return their result. Return `_ORDINARY` for all others.

    They are the assignment of `.data`, copies, pickles, exports to other libraries, and for the parameter itself also
    `requires_grad` and gradient hooks.
    """
    if func == Tensor.data.__set__:  # type: ignore[attr-defined]
        value = args[1]
        Tensor.data.__set__(weight, value.detach().clone())  # type: ignore[attr-defined]
        if not weight._is_view_of_weight:
            weight._whole = Tensor.data.__get__(weight)  # type: ignore[attr-defined]
            _write_back(weight)
        return None
    if func in (Tensor.__deepcopy__, Tensor.__reduce_ex__):
        plain = _plain(weight)
        return plain.clone() if func is Tensor.__deepcopy__ else plain.__reduce_ex__(args[1])  # type: ignore[no-untyped-call]
    if func in (Tensor.numpy, Tensor.__array__):
        array = func(_plain(weight) if func is Tensor.__array__ else weight, *args[1:], **kwargs)
        array.flags.writeable = False  # numpy then raises its own error on a write
        return array
    if func is Tensor.__dlpack__:
        warnings.warn(
            f"what is written through DLPack into {weight._parts.name} is lost: it is split and computed from "
            "its parts; write into the parts, which are parameters, or call merge_fused(model) first",
            stacklevel=4,
        )
    if not weight._represents_parameter:
        return _ORDINARY
    if func == Tensor.requires_grad.__set__ or func is Tensor.requires_grad_:  # type: ignore[attr-defined]
        flag = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
        weight._parts.require_grad(bool(flag))
        return weight if func is Tensor.requires_grad_ else None
    if func in _REGISTERS_HOOK:
        raise RuntimeError(
            f"a gradient hook on {weight._parts.name} would never run: split_fused has made its parts the parameters; "
            f"register it on each of the parts, whose gradients are slices of the weight's: "
            f"{weight._parts.name} is computed from the parameters of module.parametrizations"
        )
    return _ORDINARY


def _plain(weight: WriteThroughWeight) -> Tensor:
    """Return a plain tensor with the current values."""
    _refresh(weight)
    return weight.detach().as_subclass(Tensor).requires_grad_(weight.requires_grad)


# Ordinary functions ------------------------------------------------------------------------------------


def _writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a function writes into an argument, by its name."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or _IN_PLACE.fullmatch(name) is not None or kwargs.get("out") is not None


def _check_not_recorded(func: Callable[..., Any], args: tuple[Any, ...], writes: bool) -> None:
    """Raise RuntimeError if autograd would record a write into a weight that requires gradients.

    torch does the same for leaf tensors. The functions of `nn.init` are exempt, because they write under `no_grad`.
    They are Python functions; all other functions that write are built in.
    """
    if not (writes and args and torch.is_grad_enabled()) or isinstance(func, FunctionType):
        return
    for each in _tensors(args[:1]):
        if isinstance(each, WriteThroughWeight) and each.requires_grad:
            raise RuntimeError(
                f"{each._parts.name} requires gradients and is written in place while they are recorded; nothing was "
                "written: write under torch.no_grad(), as into any parameter"
            )


def _refresh(weight: WriteThroughWeight, always: bool = False) -> None:
    """Read the parts again if they have changed."""
    versions = _versions(weight._parts)
    if always or versions != weight._versions:
        with torch.inference_mode(False), torch.no_grad():
            whole = weight._parts.whole()
            if whole.shape == weight._whole.shape:
                weight._whole.copy_(whole)
        weight._versions[:] = versions


def _write_back(weight: WriteThroughWeight) -> None:
    """Copy the weight's values into the parts."""
    value = weight._whole if weight._is_view_of_weight else Tensor.data.__get__(weight)  # type: ignore[attr-defined]
    with torch.no_grad():
        weight._parts.assign(value)
    weight._versions[:] = _versions(weight._parts)


def _views(out: Any, weights: Sequence[WriteThroughWeight]) -> Any:
    """Make results that share the weight's memory write through as well."""
    if type(out) is Tensor:
        return next((_view(out, each) for each in weights if _shares_memory(out, each._whole)), out)
    if type(out) in (list, tuple):
        return type(out)(_views(each, weights) for each in out)
    return out


def _view(out: Tensor, weight: WriteThroughWeight) -> Tensor:
    view = out.as_subclass(WriteThroughWeight)
    return _attach_parts(
        view, weight._parts, weight._whole, parameter=False, view=True, versions=weight._versions
    )


def _shares_memory(tensor: Tensor, whole: Tensor) -> bool:
    return tensor.layout is whole.layout and tensor.untyped_storage()._cdata == whole.untyped_storage()._cdata


def _attach_parts(
    weight: WriteThroughWeight,
    parts: WeightParts,
    whole: Tensor,
    *,
    parameter: bool,
    view: bool,
    versions: list[Any] | None = None,
) -> WriteThroughWeight:
    """Set the attributes of a new WriteThroughWeight. A view shares `versions` with its weight."""
    weight._parts, weight._whole = parts, whole
    weight._represents_parameter, weight._is_view_of_weight = parameter, view
    weight._versions = _versions(parts) if versions is None else versions
    return weight


def _versions(parts: WeightParts) -> list[Any]:
    """Return what identifies the current values of the parts: identity, memory and version counter of each."""
    # Of a DTensor, the local tensor counts.
    tensors = [getattr(part, "_local_tensor", part) for part in parts.tensors()]
    return [(id(part), part.data_ptr(), _version(part)) for part in tensors]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # inference tensors do not count their versions


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
