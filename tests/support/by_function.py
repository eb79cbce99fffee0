"""Which parameters move the queries and keys of an attention, and which its values: asked of autograd, not of names.

Queries, keys and values are taken where a forward pass computes attention: at every function of the model's own
python module that has parameters of these names (transformers' attention functions and linear attentions' kernels),
at `scaled_dot_product_attention`, and around `softmax` (what it gets is made by queries and keys, and what its output
is multiplied with are values).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from blockwise_lr.blocks import Block, BlockMap

_NAMES = (("query", "key", "value"), ("query_states", "key_states", "value_states"), ("q", "k", "v"))
# What may lie between softmax and the product with the values.
_PASSED = {
    "dropout", "to", "type", "type_as", "reshape", "view", "contiguous", "mul", "__getitem__", "float", "half",
    "transpose", "unsqueeze", "squeeze", "masked_fill", "where", "nan_to_num", "permute", "flatten",
}  # fmt: skip
_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}


@dataclass
class Moved:
    """What was seen of one attention: names of the parameters that moved its scores, and its values."""

    scores: set[str] = field(default_factory=set)
    values: set[str] = field(default_factory=set)


@dataclass
class Proof:
    """What a pass showed.

    Args:
        attentions: path of an attention -> what moved it.
        missed: parameters in QK whose module ran, in an attention that was not intercepted.
        matrices: parameters that are no vectors: those that move an attention are in a block for it.
    """

    attentions: dict[str, Moved]
    missed: list[str]
    matrices: set[str]


def moved_by(model: nn.Module, blocks: BlockMap, run: Callable[[], object]) -> Proof:
    """Of every attention that ran when `run` ran the model, what moved it.

    Only parameters inside that module are asked for, and of a module that is used several times only the first time
    counts: later, its own earlier outputs move it.
    """
    labelled = {name for name, block in blocks.items() if block in (Block.QK, Block.VO, Block.QKV)}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    paths = {module: path for path, module in model.named_modules()}
    inside = {
        path: {name for name in labelled if name.startswith(f"{path}.")} for path in paths.values() if path
    }
    feeding = {name for name, block in blocks.items() if block is Block.FFN}
    # A layer around an attention is not it, but one that holds queries and keys itself may feed forward, too.
    direct = {_owner(name).rpartition(".")[0] for name in labelled}
    layers = {path for path in set(inside) - direct if any(name.startswith(f"{path}.") for name in feeding)}
    seen: dict[str, Moved] = {}
    finished: set[str] = set()
    ran: set[str] = set()
    stack: list[str] = []

    def record(scores: list[Tensor], values: list[Tensor]) -> None:
        path = next((path for path in reversed(stack) if inside.get(path) and path not in layers), None)
        if path is None or path in finished:
            return
        own = {name: parameters[name] for name in parameters if name.startswith(f"{path}.")}
        moving = Moved(_moving(scores, own), _moving(values, own))
        if moving.scores or moving.values:  # not under no_grad
            found = seen.setdefault(path, Moved())
            found.scores |= moving.scores
            found.values |= moving.values

    def enter(module: nn.Module, *_: Any) -> None:
        stack.append(paths[module])
        ran.add(paths[module])

    def leave(module: nn.Module, *_: Any) -> None:
        path = stack.pop()
        if path in seen:
            finished.add(path)

    with ExitStack() as exits:
        for module in paths:
            exits.callback(module.register_forward_pre_hook(enter).remove)
            exits.callback(module.register_forward_hook(leave).remove)
        exits.enter_context(functions_watched(model, record))
        exits.enter_context(_Watch(record))
        run()
    queries = [name for name, block in blocks.items() if block is Block.QK]
    missed = [
        name
        for name in queries
        if _owner(name) in ran and not any(name.startswith(f"{path}.") for path in seen)
    ]
    return Proof(seen, missed, {name for name, parameter in parameters.items() if parameter.ndim > 1})


def _owner(name: str) -> str:
    """The path of the module that a parameter belongs to, split or not."""
    path, split, _ = name.partition(".parametrizations.")
    return path if split else path.rpartition(".")[0]


def problems(blocks: BlockMap, proof: Proof) -> list[str]:
    """What the blocks say otherwise than autograd: QK moves scores and no values, VO no scores, nothing both.

    Any other matrix that moves an attention is a convolution or of positions.
    """
    found = [f"{name} is qk, and its attention was not intercepted" for name in proof.missed]
    for path, moved in proof.attentions.items():
        for name in sorted(moved.scores | moved.values | {n for n in blocks if n.startswith(f"{path}.")}):
            block, scores, values = blocks[name], name in moved.scores, name in moved.values
            wrong = {
                Block.QK: values or not scores,
                Block.VO: scores and "the sharper block of the two" not in blocks.reason(name),
                Block.QKV: True,
                Block.FFN: scores or values,
                Block.CONV: False,
                Block.POS: False,
            }.get(block, (scores or values) and name in proof.matrices)
            if wrong:
                found.append(f"{name} is {block}; moves scores: {scores}, values: {values}")
    return found


def _moving(tensors: list[Tensor], parameters: dict[str, nn.Parameter]) -> set[str]:
    made = [tensor for tensor in tensors if tensor.requires_grad and tensor.is_floating_point()]
    if not made:
        return set()
    total = sum((tensor.nan_to_num(0, 0, 0) * torch.randn_like(tensor)).sum() for tensor in made)
    gradients = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {n for n, g in zip(parameters, gradients) if g is not None and bool((g != 0).any())}


Record = Callable[[list[Tensor], list[Tensor]], None]


@contextmanager
def functions_watched(model: nn.Module, record: Record) -> Iterator[None]:
    """Functions of the model's python modules with queries, keys and values among their parameters."""
    with ExitStack() as exits:
        for name in {type(module).__module__ for module in model.modules()}:
            if name.startswith("torch."):
                continue
            for attribute, function in list(vars(sys.modules[name]).items()):
                names = _named_parameters(function)
                if names:
                    watched = _watched(function, names, record)
                    exits.enter_context(patch.object(sys.modules[name], attribute, watched))
        for attribute in ("_in_projection_packed", "_in_projection"):  # nn.MultiheadAttention's
            watched = _made(getattr(functional, attribute), record)
            exits.enter_context(patch.object(functional, attribute, watched))
        yield


def _made(function: Any, record: Record) -> Any:
    """Of a function that returns queries, keys and values."""

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        query, key, value = out = function(*args, **kwargs)
        record([query, key], [value])
        return out

    return watched


def _named_parameters(function: Any) -> tuple[str, str, str] | None:
    if not inspect.isfunction(function):
        return None
    known = set(inspect.signature(function).parameters)
    return next((names for names in _NAMES if known >= set(names)), None)


def _watched(function: Any, names: tuple[str, str, str], record: Record) -> Any:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        query, key, value = (bound.get(name) for name in names)
        if all(isinstance(each, Tensor) for each in (query, key, value)):
            record([query, key], [value])
        return function(*args, **kwargs)

    return watched


def _mixes_heads(name: str, tensors: list[Tensor], out: Tensor) -> bool:
    """Whether a square matrix was applied to the weights of the heads (talking heads)."""
    return name == "linear" and bool(tensors) and out.shape == tensors[0].shape


class _Watch(TorchFunctionMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the tensor (kept alive), and its scores

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if function is functional.scaled_dot_product_attention:
            query, key, value = [*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :])][:3]
            self._record([query, key], [value])
        out = function(*args, **kwargs)
        tensors = [
            t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)
        ]
        weights = [self._weights[id(tensor)] for tensor in tensors if id(tensor) in self._weights]
        if name == "softmax" and isinstance(out, Tensor):
            self._weights[id(out)] = (out, tensors[0])
        elif weights and isinstance(out, Tensor) and (name in _PASSED or _mixes_heads(name, tensors, out)):
            self._weights[id(out)] = (out, weights[0][1])
        elif weights and name in _PRODUCTS:
            self._record([weights[0][1]], [t for t in tensors if id(t) not in self._weights][-1:])
        return out
