"""Move parameters in place along the optimizer's update, and restore them to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from blockwise_lr.directional.parameter_chunks import Chunk
from blockwise_lr.directional.state_updates import wide
from blockwise_lr.directional.updates import Updates
from blockwise_lr.distributed import is_sharded, local
from blockwise_lr.fp32 import HALF


@contextmanager
def restored_parameters(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Yield the values of the parameters, which may be moved inside the context. On exit, restore them exactly.

    The context holds one copy in float32 or float64. Half-precision parameters are replaced by that copy, and the
    tensors of the caller are the values; their gradients are set aside. All other parameters are moved in place, and
    the copy is the values.

    Args:
        parameters: parameters of the model, whole or sharded.
    """
    half = {i: (p.data, p.grad) for i, p in enumerate(parameters) if p.dtype in HALF and not is_sharded(p)}
    whole = [p for i, p in enumerate(parameters) if i not in half]
    copies = _copied([local(p.detach()) for p in whole])
    remaining = iter(copies)
    values = [half[i][0] if i in half else next(remaining) for i in range(len(parameters))]
    try:
        wide_copies = _copied([data for data, _ in half.values()], torch.float32)
        for i, wide_copy in zip(half, wide_copies):
            parameters[i].grad = None  # torch requires a gradient of the parameter's dtype
            parameters[i].data = wide_copy
        del wide_copies
        yield values
    finally:
        for i, (data, gradient) in half.items():
            parameters[i].grad = None
            parameters[i].data, parameters[i].grad = data, gradient
        if whole:
            with torch.no_grad():
                torch._foreach_copy_([local(p.detach()) for p in whole], copies)


@contextmanager
def widened_others(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Replace all other half-precision tensors of a model by float32 copies: frozen parameters, and buffers.

    Otherwise, the forward pass of the moved parameters would compute partly in half precision.

    Args:
        model: the model.
        parameters: the parameters that :func:`restored_parameters` replaces.
    """
    moved = {id(parameter) for parameter in parameters}
    others = [
        tensor
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.dtype in HALF and not is_sharded(tensor) and id(tensor) not in moved
    ]
    kept = [(tensor, tensor.data, tensor.grad) for tensor in others]
    try:
        for tensor, data, _ in kept:
            tensor.grad = None  # torch requires a gradient of the tensor's dtype
            tensor.data = data.float()
        yield
    finally:
        for tensor, data, gradient in kept:
            tensor.grad = None
            tensor.data, tensor.grad = data, gradient


def _copied(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return copies of the tensors, in the given dtype or in their own."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


class MovedParameters:
    r"""The parameters at the point before the last update, and from there along the update of each block.

        theta(f) = (theta + lr u) / (1 - lr decay) + f u

    The state of an optimizer holds an update that has already been applied. Measured after that update, a slope shows
    only the gain of a further update of the same kind. A block that has just reached the minimum along its update would
    then seem to need no learning rate.

    Every position is computed from the values at the start, so the same factor gives the same bits.

    Args:
        parameters: parameters of the model.
        values: their values, from :func:`restored_parameters`.
        updates: the updates.
        last_step: the learning rate and the decoupled weight decay of the last step, for each parameter. None: the
            update has not been applied, so theta(f) = theta + f u.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        values: Sequence[Tensor],
        updates: Updates,
        last_step: Sequence[tuple[float, float]] | None,
    ) -> None:
        self.updates = updates
        self._parameters, self._values, self._last_step = parameters, values, last_step

    def move(self, chunks: Iterable[Chunk], factor: float) -> None:
        """Set the parameters of the chunks to theta(factor)."""
        with torch.no_grad():
            for chunk in chunks:
                targets = [chunk.view(local(self._parameters[i].detach())) for i in chunk.indices]
                torch._foreach_copy_(targets, list(self._position(chunk, factor).unbind()))

    def _position(self, chunk: Chunk, factor: float) -> Tensor:
        position = wide(chunk.stack(self._values))
        if self._last_step is None and not factor:
            return position
        update = self.updates.of(chunk)
        if self._last_step is not None:
            lr, decay = self._last_step[chunk.indices[0]]
            position = position.add(update, alpha=lr).div_(1 - lr * decay)
        return position.add(update, alpha=factor) if factor else position
