"""The signals of all blocks from one backward pass, which frees every gradient as soon as it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from blockwise_lr.blocks import Block
from blockwise_lr.directional.parameter_chunks import Chunk, chunk_elements, chunks
from blockwise_lr.directional.updates import Updates
from blockwise_lr.distributed import is_sharded, local
from blockwise_lr.sharpness.gradient_checks import check_gradient
from blockwise_lr.sharpness.model_gradients import MeasuredModel, gradients_of_sum
from blockwise_lr.sharpness.parameter_parts import ParameterParts


def update_signals(
    measured: MeasuredModel, loss: Tensor, updates: Updates, blocks: Sequence[Block]
) -> Tensor:
    """Return s_b = <g, u_b> of each block, with this process's share of the gradient: (blocks,) float64.

    The sum over all processes is the signal of the global batch. If the model is not sharded, the memory is that of the
    largest gradients and not of all. The gradients of a sharded model are written by ``backward()`` and kept until its
    end.

    Args:
        measured: the model.
        loss: the loss, summed over this process's samples.
        updates: the updates.
        blocks: the blocks.
    """
    parts = measured.parts
    totals = _Signals(parts, updates, blocks)
    if parts.sharded:
        for i, gradient in enumerate(gradients_of_sum(measured, loss)):
            if gradient is not None and (not is_sharded(gradient) or _counts_elements(parts, i)):
                totals.add(i, local(gradient))
    else:
        with _gradients_go_to(totals.add, parts):
            torch.autograd.grad(loss, parts.parameters, allow_unused=True)
    return totals.sums()


def squared_lengths(
    parts: ParameterParts, updates: Updates, blocks: Mapping[Block, Sequence[Chunk]]
) -> Tensor:
    """Return <u_b, u_b> of each block, over all shards: (blocks,) float64.

    Args:
        parts: the parts of the model's parameters.
        updates: the updates.
        blocks: the chunks of each block.
    """
    total = torch.zeros(len(blocks), dtype=torch.float64, device=parts.parameters[0].device)
    for row, chunks_of_block in enumerate(blocks.values()):
        for chunk in chunks_of_block:
            if _counts_elements(parts, chunk.indices[0]):
                update = updates.of(chunk)
                total[row] += on_device(dot(update, update), total.device)
    if parts.sharded:
        dist.all_reduce(total)
    return total


class _Signals:
    """The signals of the gradients that were added so far. Small gradients are collected, so that they share kernels.

    Args:
        parts: the parts of the model's parameters.
        updates: the updates.
        blocks: the blocks.
    """

    def __init__(self, parts: ParameterParts, updates: Updates, blocks: Sequence[Block]) -> None:
        self._updates, self._rows = updates, {block: row for row, block in enumerate(blocks)}
        self._pieces = parts.blocks_and_slices()
        self._tensors = [local(parameter.detach()) for parameter in parts.parameters]
        self._elements = chunk_elements(self._tensors)
        self._totals = torch.zeros(len(blocks), dtype=torch.float64, device=self._tensors[0].device)
        self._collected: dict[int, Tensor] = {}

    def add(self, i: int, gradient: Tensor) -> None:
        """Add the gradient of parameter number i."""
        self._collected[i] = gradient
        if sum(each.numel() for each in self._collected.values()) >= self._elements:
            self._use_collected()

    def sums(self) -> Tensor:
        """Return the signal of each block: (blocks,) float64."""
        self._use_collected()
        return self._totals

    def _use_collected(self) -> None:
        with torch.no_grad():
            for chunk in chunks(
                self._pieces, self._tensors, self._updates.kinds, self._elements, only=self._collected
            ):
                if (row := self._rows.get(chunk.block)) is not None:
                    signal = dot(chunk.stack(self._collected), self._updates.of(chunk))
                    self._totals[row] += on_device(signal, self._totals.device)
        self._collected.clear()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the float64 sum of products of two tensors of one shape."""
    wide = a.reshape(-1).double()
    return torch.dot(wide, wide if a is b else b.reshape(-1).double())


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, itself if it is there."""
    return tensor if tensor.device == device else tensor.to(device)


def _counts_elements(parts: ParameterParts, i: int) -> bool:
    """Return whether this process counts its elements of a parameter. No two processes count the same element."""
    return parts.own(i, local(parts.parameters[i].detach()), None).numel() > 0


@contextmanager
def _gradients_go_to(take: Callable[[int, Tensor], None], parts: ParameterParts) -> Iterator[None]:
    """Pass each gradient of a backward pass inside the context to `take`, with the parameter's number.

    In the place of the gradient, the backward pass keeps a zero that is expanded to its shape and takes no memory.
    """

    def taken(i: int, gradient: Tensor) -> Tensor:
        check_gradient(parts.names[i], gradient, "measure_directional")
        take(i, gradient)
        return gradient.new_zeros(()).expand_as(gradient)

    hooks = [
        parameter.register_hook(partial(taken, i))  # type: ignore[no-untyped-call]
        for i, parameter in enumerate(parts.parameters)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
