"""The arithmetic of Adam-mini where each piece lies in one process, with foreach operations.

Two bounds keep the step cheap. Parameters are updated in chunks of a bounded number of elements, so temporary tensors
stay small. Within a chunk, small parameters of one shape are copied into one buffer. The number of kernels therefore
grows with the number of elements and of different shapes, and not with the number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from blockwise_lr.optimizers.adam_mini_views import StepInputs, View, view_of

_CHUNK_ON_GPU = 2**22
_CHUNK = {"cpu": 2**20}
"""Largest number of elements that are updated together: 16 MiB in float32 on a GPU."""

_ALONE_ON_GPU = 2**20
_ALONE = {"cpu": 2**14}
"""Number of elements above which kernels for one parameter cost less than copying it into a buffer."""


def foreach_step(inputs: Sequence[StepInputs]) -> None:
    """Update all parameters of a group."""
    alike: dict[Any, list[View]] = {}
    for each in inputs:
        if each.gradient.numel():
            view = view_of(each)
            dtypes = (view.parameter.dtype, view.gradient.dtype, view.first.dtype)
            alike.setdefault((view.parameter.device, dtypes), []).append(view)
    for (device, _), views in alike.items():
        for chunk in _chunks(views, _CHUNK.get(device.type, _CHUNK_ON_GPU)):
            _step_chunk(_batches(chunk, _ALONE.get(device.type, _ALONE_ON_GPU)))


def _chunks(views: Sequence[View], limit: int) -> Iterator[list[View]]:
    """Divide the views into lists of at most `limit` elements, and cut views that are larger than this."""
    chunk: list[View] = []
    size = 0
    for view in views:
        for part in view.slices(limit):
            if chunk and size + part.numel > limit:
                yield chunk
                chunk, size = [], 0
            chunk.append(part)
            size += part.numel
    yield chunk


class _Batch:
    """Views whose shapes differ in the first dimension only, so that they can follow one another in one buffer.

    Attributes:
        views: the views; a large one is alone in its batch.
        buffer: the copies of their gradients in the dtype of the moments; None if their own gradients are used.
        gradients: their gradients in that dtype: the parts of the buffer, or their own.
    """

    def __init__(self, views: list[View]) -> None:
        first = views[0].first
        self.views, self.within = views, views[0].within
        self.joined = bool(self.within) and len(views) > 1
        self.buffer: Tensor | None = None
        self.gradients = [view.gradient for view in views]
        if self.joined or views[0].inputs.maximize or self.gradients[0].dtype != first.dtype:
            rows = sum(self._rows)
            self.buffer = torch.empty((rows, *first.shape[1:]), dtype=first.dtype, device=first.device)
            self.gradients = list(self.buffer.split_with_sizes(self._rows))

    @property
    def _rows(self) -> list[int]:
        return [len(view.first) for view in self.views]

    def mean_squares(self, scale: float) -> Sequence[Tensor]:
        """Return the means of the squared gradients over each piece, times `scale`. Overwrites the buffer."""
        values = self.gradients[0] if self.buffer is None else self.buffer
        scale /= self.views[0].numel // self.views[0].second.numel()
        if self.within == (1,):
            # This avoids a copy of the gradient. Along other dimensions the norm is 9 times slower.
            norm: Tensor = torch.linalg.vector_norm(values, dim=1, keepdim=True)
            mean = norm.square_().mul_(scale)
        else:
            squares = values.square() if self.buffer is None else values.square_()
            mean = squares.sum(self.within, keepdim=True).mul_(scale)
        return mean.split_with_sizes(self._rows)

    def spread(self, steps: Sequence[Tensor], buffer: Tensor | None) -> Sequence[Tensor]:
        """Repeat the number of each piece over the piece, in `buffer` or in a new one."""
        values = torch.cat(list(steps))
        if buffer is None:
            shape = (len(values), *self.views[0].first.shape[1:])
            return values.expand(shape).contiguous().split_with_sizes(self._rows)
        return buffer.copy_(values).split_with_sizes(self._rows)


def _batches(views: Sequence[View], alone: int) -> list[_Batch]:
    """Divide the views into batches. Views of more than `alone` elements are alone in theirs."""
    found: dict[Any, list[View]] = {}
    for i, view in enumerate(views):
        key = i if view.within and view.numel > alone else (view.first.shape[1:], view.within)
        found.setdefault(key, []).append(view)
    return [_Batch(each) for each in found.values()]


def _step_chunk(batches: Sequence[_Batch]) -> None:
    """Update views that agree in device, dtypes and all settings but the number of steps taken."""
    views = [view for batch in batches for view in batch.views]
    gradients = [gradient for batch in batches for gradient in batch.gradients]
    inputs, (beta1, beta2) = views[0].inputs, views[0].inputs.betas
    copied = [i for i, view in enumerate(views) if gradients[i] is not view.gradient]
    if copied:
        torch._foreach_copy_([gradients[i] for i in copied], [views[i].gradient for i in copied])
    if inputs.maximize:
        torch._foreach_neg_(gradients)
    firsts, seconds = [view.first for view in views], [view.second for view in views]
    torch._foreach_lerp_(firsts, gradients, 1 - beta1)
    torch._foreach_mul_(seconds, beta2)
    _add_squares(batches, 1 - beta2)
    steps = list(torch._foreach_sqrt(seconds))
    torch._foreach_add_(steps, [view.inputs.eps / view.inputs.root for view in views])
    torch._foreach_reciprocal_(steps)
    torch._foreach_mul_(steps, [-view.inputs.rate / view.inputs.root for view in views])
    _move(batches, steps, inputs.decay)


def _add_squares(batches: Sequence[_Batch], scale: float) -> None:
    """Add the means of the squared gradients, times `scale`, to the second moments."""
    by_element = [batch for batch in batches if not batch.within]
    if by_element:
        seconds = [view.second for batch in by_element for view in batch.views]
        gradients = [gradient for batch in by_element for gradient in batch.gradients]
        torch._foreach_addcmul_(seconds, gradients, gradients, scale)
    apart = [batch for batch in batches if batch.within]
    if apart:
        seconds = [view.second for batch in apart for view in batch.views]
        torch._foreach_add_(seconds, [mean for batch in apart for mean in batch.mean_squares(scale)])


def _move(batches: Sequence[_Batch], steps: Sequence[Tensor], decay: float) -> None:
    """Compute parameter <- decay * parameter + step * first moment, in float32 or higher precision."""
    views = [view for batch in batches for view in batch.views]
    parameters = [view.parameter for view in views]
    targets = parameters
    if half := parameters[0].dtype != views[0].first.dtype:
        targets = [gradient for batch in batches for gradient in batch.gradients]
        torch._foreach_copy_(targets, parameters)
    torch._foreach_mul_(targets, decay)
    moved: list[Tensor] = []
    firsts: list[Tensor] = []
    factors: list[Tensor] = []
    start = 0
    for batch in batches:
        own = slice(start, start := start + len(batch.views))
        if batch.within and not batch.joined:
            targets[start - 1].addcmul_(batch.views[0].first, steps[start - 1])
            continue
        moved += targets[own]
        firsts += [view.first for view in batch.views]
        factors += batch.spread(steps[own], None if half else batch.buffer) if batch.joined else steps[own]
    if moved:
        torch._foreach_addcmul_(moved, firsts, factors)
    if half:
        torch._foreach_copy_(parameters, targets)
