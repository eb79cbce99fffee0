"""The arithmetic of Adam-mini where each piece lies in one process, with foreach operations or torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from blockwise_lr.distributed import local

_LARGE = 2**14
"""Number of elements above which the pass over memory takes longer than the call of compiled code."""

_ROWS = 12
"""Rows summed at a time if a piece is a column, few enough that they stay in the cache."""


@dataclass(frozen=True)
class StepInputs:
    """One parameter with everything that its step needs.

    Args:
        parameter: the parameter; it may be a DTensor.
        gradient, first, second: this process's shards of the gradient and of both moments. `second` has one element
            per piece.
        partition: number of pieces along each dimension of the whole parameter.
        betas, eps: as in Adam.
        decay: factor that weight decay applies to the parameter.
        rate: learning rate divided by the bias correction of the first moment.
        root: 1 divided by the square root of the bias correction of the second moment.
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
    """Views of the same memory, with shapes in which the second moments broadcast over the other tensors."""

    parameter: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    within: tuple[int, ...]
    """The dimensions within a piece."""


def _views(inputs: StepInputs) -> _Views:
    parameter, count = local(inputs.parameter.detach()), inputs.second.numel()
    tensors = (parameter, inputs.gradient.to(inputs.first.dtype), inputs.first)
    contiguous = all(tensor.is_contiguous() for tensor in tensors)
    within: tuple[int, ...]
    if count == parameter.numel():  # one piece per element
        return _Views(parameter, tensors[1], tensors[2], inputs.second, ())
    if contiguous and inputs.second.shape[0] == count:  # a piece is one or several rows
        shape, apart, within = torch.Size((count, parameter.numel() // count)), torch.Size((count, 1)), (1,)
    elif parameter.ndim == 2 and inputs.second.shape[1] == count:  # a piece is one or several columns
        rows, columns = parameter.shape
        shape, apart, within = torch.Size((rows, count, columns // count)), torch.Size((1, count, 1)), (0, 2)
    else:  # split each dimension into the piece and the position within it
        pairs = list(zip(inputs.second.shape, parameter.shape))
        shape = torch.Size([size for n, whole in pairs for size in (n, whole // n)])
        apart = torch.Size([size for n, _ in pairs for size in (n, 1)])
        within = tuple(range(1, 2 * len(pairs), 2))
    parameter, gradient, first = (tensor.view(shape) for tensor in tensors)
    return _Views(parameter, gradient, first, inputs.second.view(apart), within)


def _mean_square(views: _Views, scale: float) -> Tensor:
    """Return the mean of the squared gradient over each piece, times `scale`."""
    count = views.gradient.numel() // views.second.numel()
    if views.within == (1,):
        # This avoids a copy of the gradient. Along other dimensions the norm is 9 times slower.
        norm: Tensor = torch.linalg.vector_norm(views.gradient, dim=1, keepdim=True)
        return norm.square_().mul_(scale / count)
    return views.gradient.square().sum(views.within, keepdim=True).mul_(scale / count)


def foreach_step(inputs: Sequence[StepInputs]) -> None:
    """Update all parameters of a group, mostly with one foreach call for all of them."""
    inputs = [each for each in inputs if each.gradient.numel()]
    if not inputs:
        return
    beta1, beta2 = inputs[0].betas
    views = [_views(each) for each in inputs]
    gradients, firsts, seconds = zip(*((view.gradient, view.first, view.second) for view in views))
    torch._foreach_mul_(seconds, beta2)
    by_element = [i for i, view in enumerate(views) if not view.within]
    if by_element:
        squared = [gradients[i] for i in by_element]
        torch._foreach_addcmul_([seconds[i] for i in by_element], squared, squared, 1 - beta2)
    apart = [view for view in views if view.within]
    if apart:
        squares = [_mean_square(view, 1 - beta2) for view in apart]
        torch._foreach_add_([view.second for view in apart], squares)
    torch._foreach_lerp_(firsts, gradients, 1 - beta1)
    steps = torch._foreach_sqrt(seconds)
    torch._foreach_add_(steps, [each.eps / each.root for each in inputs])
    torch._foreach_reciprocal_(steps)
    torch._foreach_mul_(steps, [-each.rate / each.root for each in inputs])
    for each, view, step in zip(inputs, views, steps):
        move(view.parameter, view.first, step, each.decay)


def move(parameter: Tensor, first: Tensor, step: Tensor, decay: float) -> None:
    """Compute parameter <- decay * parameter + step * first, in float32 or higher precision."""
    if parameter.dtype == first.dtype:
        parameter.mul_(decay).addcmul_(first, step)
    else:
        parameter.copy_(parameter.to(first.dtype).mul_(decay).addcmul_(first, step))


def compiled_step(inputs: Sequence[StepInputs]) -> None:
    """Do the same as :func:`foreach_step` with torch.compile, in one pass over the memory of each parameter.

    Small parameters are updated by :func:`foreach_step`.
    """
    foreach_step([each for each in inputs if each.gradient.numel() < _LARGE])
    scalars: dict[float, Tensor] = {}

    def scalar(value: float) -> Tensor:  # tensors, because each new Python number would cause a recompilation
        return scalars.setdefault(value, torch.tensor(value, dtype=torch.float64))

    with torch._dynamo.config.patch(recompile_limit=64):
        for each in inputs:
            if each.gradient.numel() < _LARGE:
                continue
            view, rate, root, decay = _views(each), scalar(each.rate), scalar(each.root), scalar(each.decay)
            size = (view.second, each.betas[1], each.eps, rate, root)
            moved = (view.parameter, view.gradient, view.first, each.betas[0], decay)
            if view.within in ((), (1,)):
                _compiled(_one_step)(view.within, size, moved)
                continue
            # Compiled together with the move, the sizes would be recomputed in each row.
            if view.within == (0, 2):
                some = _divisor(len(view.gradient), _ROWS)
                sizes = _compiled(_step_size_of_columns)(view.gradient, some, *size)
            else:
                sizes = _compiled(_step_size)(view.gradient, view.within, *size)
            _compiled(_move_by)(sizes, *moved)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _divisor(number: int, at_most: int) -> int:
    """Return the largest divisor of `number` that is at most `at_most`."""
    return next(n for n in range(min(at_most, number), 0, -1) if number % n == 0)


def _one_step(within: tuple[int, ...], size: tuple[Any, ...], moved: tuple[Any, ...]) -> None:
    _move_by(_step_size(moved[1], within, *size), *moved)


def _step_size(gradient: Tensor, within: tuple[int, ...], second: Tensor, *rest: Any) -> Tensor:
    """Update `second`, and return the factor of the first moment for each piece."""
    square = gradient * gradient
    total = square.sum(within, keepdim=True) if within else square
    return _step_size_from(total, gradient.numel() // second.numel(), second, *rest)


def _step_size_of_columns(gradient: Tensor, some: int, second: Tensor, *rest: Any) -> Tensor:
    """Do the same as :func:`_step_size` for a gradient of shape (rows, pieces, columns of a piece).

    The sums follow the order of the memory: over `some` rows at a time, then over these sums, then over the columns of
    a piece.
    """
    rows, pieces, width = gradient.shape
    by_row = gradient.reshape(rows // some, some, pieces * width)
    total = (by_row * by_row).sum(1).sum(0).view(1, pieces, width).sum(2, keepdim=True)
    return _step_size_from(total, gradient.numel() // second.numel(), second, *rest)


def _step_size_from(
    total: Tensor, count: int, second: Tensor, beta2: float, eps: float, rate: Tensor, root: Tensor
) -> Tensor:
    second.mul_(beta2).add_(total * ((1 - beta2) / count))
    kind: dict[str, Any] = {"dtype": second.dtype}
    return rate.to(**kind) / (second.sqrt() * root.to(**kind) + eps)


def _move_by(
    step: Tensor, parameter: Tensor, gradient: Tensor, first: Tensor, beta1: float, decay: Tensor
) -> None:
    first.lerp_(gradient, 1 - beta1)
    kind: dict[str, Any] = {"dtype": first.dtype}
    parameter.copy_(parameter.to(**kind) * decay.to(**kind) - first * step)


def spread(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat the value of each piece over the piece.

    Args:
        value: one number per piece, with as many dimensions as the parameter.
        shape: shape of the parameter; each size is a multiple of the size in `value`.

    Example:
        >>> import torch
        >>> spread(torch.tensor([[1.0], [2.0]]), (4, 1)).flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    for dim, size in enumerate(shape):
        if value.shape[dim] != size:
            value = value.repeat_interleave(size // value.shape[dim], dim)
    return value
