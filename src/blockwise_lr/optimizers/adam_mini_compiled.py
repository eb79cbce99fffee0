"""The arithmetic of Adam-mini with torch.compile: one pass over the memory of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from blockwise_lr.optimizers.adam_mini_kernel import foreach_step
from blockwise_lr.optimizers.adam_mini_views import StepInputs, view_of

_LARGE = 2**14
"""Number of elements above which the pass over memory takes longer than the call of compiled code."""

_ROWS = 12
"""Rows summed at a time if a piece is a column, few enough that they stay in the cache."""


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
            view, rate, root, decay = view_of(each), scalar(each.rate), scalar(each.root), scalar(each.decay)
            tensors = [view.parameter, view.gradient, view.first, view.second]
            by_column = view.within == (1, 3) and len(view.first) == 1
            if by_column:
                tensors = [tensor[0] for tensor in tensors]
            parameter, gradient, first, second = tensors
            size = (second, each.betas[1], each.eps, rate, root)
            moved = (parameter, gradient, first, each.betas[0], decay, each.maximize)
            if view.within in ((), (1,)):
                _compiled(_one_step)(view.within, size, moved)
                continue
            # Compiled together with the move, the sizes would be recomputed in each row.
            if by_column:
                some = _divisor(len(gradient), _ROWS)
                sizes = _compiled(_step_size_of_columns)(gradient, some, *size)
            else:
                sizes = _compiled(_step_size)(gradient, view.within, *size)
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
    wide = gradient.to(second.dtype)
    square = wide * wide
    total = square.sum(within, keepdim=True) if within else square
    return _step_size_from(total, gradient.numel() // second.numel(), second, *rest)


def _step_size_of_columns(gradient: Tensor, some: int, second: Tensor, *rest: Any) -> Tensor:
    """Do the same as :func:`_step_size` for a gradient of shape (rows, pieces, columns of a piece).

    The sums follow the order of the memory: over `some` rows at a time, then over these sums, then over the columns of
    a piece.
    """
    rows, pieces, width = gradient.shape
    by_row = gradient.to(second.dtype).reshape(rows // some, some, pieces * width)
    total = (by_row * by_row).sum(1).sum(0).view(1, pieces, width).sum(2, keepdim=True)
    return _step_size_from(total, gradient.numel() // second.numel(), second, *rest)


def _step_size_from(
    total: Tensor, count: int, second: Tensor, beta2: float, eps: float, rate: Tensor, root: Tensor
) -> Tensor:
    second.mul_(beta2).add_(total * ((1 - beta2) / count))
    kind: dict[str, Any] = {"dtype": second.dtype}
    return rate.to(**kind) / (second.sqrt() * root.to(**kind) + eps)


def _move_by(
    step: Tensor,
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    beta1: float,
    decay: Tensor,
    maximize: bool,
) -> None:
    kind: dict[str, Any] = {"dtype": first.dtype}
    first.lerp_(-gradient.to(**kind) if maximize else gradient.to(**kind), 1 - beta1)
    parameter.copy_(parameter.to(**kind) * decay.to(**kind) - first * step)
