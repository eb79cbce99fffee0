"""Adam-mini's arithmetic on parameters that are whole, or whose shards cut no piece: by foreach, or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from blockwise_lr.sharpness.processes import local

_LARGE = 2**14
"""Elements from which on the pass over memory takes longer than a call of compiled code."""


@dataclass(frozen=True)
class Pieces:
    """One parameter, with what its step takes.

    Args:
        parameter: possibly a DTensor.
        gradient, first, second: this process's shards of the gradient and both moments; `second` has one element for
            each piece.
        partition: pieces along each dimension of the whole parameter.
        betas, eps: as Adam's.
        decay: what weight decay leaves of the parameter.
        rate: learning rate over the first moment's bias correction.
        root: 1 over the root of the second moment's bias correction.
        whole: whether each piece lies in one process.
    """

    parameter: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    partition: tuple[int, ...]
    betas: tuple[float, float]
    decay: float
    rate: float
    root: float
    eps: float
    whole: bool


@dataclass(frozen=True)
class _Views:
    """The same memory, in shapes in which the second moments broadcast over the rest."""

    parameter: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    within: tuple[int, ...]
    """The dimensions inside of a piece."""


def _views(pieces: Pieces) -> _Views:
    parameter, count = local(pieces.parameter.detach()), pieces.second.numel()
    tensors = (parameter, pieces.gradient.to(pieces.first.dtype), pieces.first)
    contiguous = all(tensor.is_contiguous() for tensor in tensors)
    within: tuple[int, ...]
    if count == parameter.numel():  # by element
        shape, apart, within = parameter.shape, parameter.shape, ()
    elif contiguous and pieces.second.shape[0] == count:  # by rows, or several rows
        shape, apart, within = torch.Size((count, parameter.numel() // count)), torch.Size((count, 1)), (1,)
    else:  # every dimension in two: which piece, and where in it
        pairs = list(zip(pieces.second.shape, parameter.shape))
        shape = torch.Size([size for n, whole in pairs for size in (n, whole // n)])
        apart = torch.Size([size for n, _ in pairs for size in (n, 1)])
        within = tuple(range(1, 2 * len(pairs), 2))
    parameter, gradient, first = (tensor.view(shape) for tensor in tensors)
    return _Views(parameter, gradient, first, pieces.second.view(apart), within)


def _mean_square(views: _Views, scale: float) -> Tensor:
    """The mean of the gradient's square over each piece, times `scale`."""
    if not views.within:
        return views.gradient.square().mul_(scale)
    count = views.gradient.numel() // views.second.numel()
    norm: Tensor = torch.linalg.vector_norm(views.gradient, dim=views.within, keepdim=True)
    return norm.square_().mul_(scale / count)


def foreach_step(pieces: Sequence[Pieces]) -> None:
    """A step of all parameters of a group, most of it in one call for all."""
    views = [(each, _views(each)) for each in pieces if each.gradient.numel()]
    if not views:
        return
    beta1, beta2 = pieces[0].betas
    seconds = [view.second for _, view in views]
    torch._foreach_mul_(seconds, beta2)
    torch._foreach_add_(seconds, [_mean_square(view, 1 - beta2) for _, view in views])
    torch._foreach_lerp_([view.first for _, view in views], [view.gradient for _, view in views], 1 - beta1)
    steps = torch._foreach_sqrt(seconds)
    torch._foreach_mul_(steps, [each.root for each, _ in views])
    torch._foreach_add_(steps, pieces[0].eps)
    torch._foreach_reciprocal_(steps)
    torch._foreach_mul_(steps, [-each.rate for each, _ in views])
    for (each, view), step in zip(views, steps):
        move(view.parameter, view.first, step, each.decay)


def move(parameter: Tensor, first: Tensor, step: Tensor, decay: float) -> None:
    """parameter <- decay * parameter + step * first, in float32 at least."""
    if parameter.dtype == first.dtype:
        parameter.mul_(decay).addcmul_(first, step)
    else:
        parameter.copy_(parameter.to(first.dtype).mul_(decay).addcmul_(first, step))


def compiled_step(pieces: Sequence[Pieces]) -> None:
    """The same by torch.compile, in one pass over the memory of each parameter; small ones by foreach."""
    foreach_step([each for each in pieces if each.gradient.numel() < _LARGE])
    step = _compiled()
    scalars: dict[float, Tensor] = {}

    def scalar(value: float) -> Tensor:  # as tensors, or each new value would be compiled anew
        return scalars.setdefault(value, torch.tensor(value, dtype=torch.float64))

    with torch._dynamo.config.patch(recompile_limit=64):
        for each in pieces:
            if each.gradient.numel() < _LARGE:
                continue
            view = _views(each)
            step(
                (view.parameter, view.gradient, view.first, view.second),
                view.within,
                each.betas,
                each.eps,
                scalar(each.decay),
                scalar(each.rate),
                scalar(each.root),
            )


@cache
def _compiled() -> Callable[..., None]:
    return torch.compile(_one_step, dynamic=True)


def _one_step(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    within: tuple[int, ...],
    betas: tuple[float, float],
    eps: float,
    decay: Tensor,
    rate: Tensor,
    root: Tensor,
) -> None:
    parameter, gradient, first, second = tensors
    square = gradient * gradient
    mean = square.mean(within, keepdim=True) if within else square
    second.mul_(betas[1]).add_(mean * (1 - betas[1]))
    first.lerp_(gradient, 1 - betas[0])
    kind: dict[str, Any] = {"dtype": first.dtype}
    step = rate.to(**kind) / (second.sqrt() * root.to(**kind) + eps)
    parameter.copy_(parameter.to(**kind) * decay.to(**kind) - first * step)
