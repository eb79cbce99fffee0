"""The signals of all blocks from one backward pass, which frees every gradient as soon as it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from blockwise_lr.blocks import Block
from blockwise_lr.directional.parameter_chunks import Chunk, chunk_elements, chunks
from blockwise_lr.directional.updates import Updates
from blockwise_lr.distributed import is_sharded, local
from blockwise_lr.sharpness.model_gradients import MeasuredModel, stream_gradients
from blockwise_lr.sharpness.parameter_parts import ParameterParts
from blockwise_lr.sharpness.tensor_sums import to_device


def update_signals(
    measured: MeasuredModel, loss: Tensor, updates: Updates, blocks: Sequence[Block]
) -> Tensor:
    """Return s_b = <g, u_b> of each block, with this process's share of the gradient: (blocks,) float64.

    The sum over all processes is the signal of the global batch. Of the gradients, no more exist at a time than
    :func:`stream_gradients` passes on.

    Args:
        measured: the model.
        loss: the loss, summed over this process's samples.
        updates: the updates.
        blocks: the blocks.
    """
    signals = _Signals(measured.parts, updates, blocks)
    stream_gradients(measured, loss, signals.add)
    return signals.totals


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
                total[row] += to_device(dot(update, update), total.device)
    if parts.sharded:
        dist.all_reduce(total)
    return total


class _Signals:
    """The signals of the gradients that were added so far.

    Args:
        parts: the parts of the model's parameters.
        updates: the updates.
        blocks: the blocks.

    Attributes:
        totals: the signal of each block: (blocks,) float64.
    """

    def __init__(self, parts: ParameterParts, updates: Updates, blocks: Sequence[Block]) -> None:
        self._parts, self._updates = parts, updates
        self._rows = {block: row for row, block in enumerate(blocks)}
        self._pieces = parts.blocks_and_slices()
        self._tensors = [local(parameter.detach()) for parameter in parts.parameters]
        self.totals = torch.zeros(len(blocks), dtype=torch.float64, device=self._tensors[0].device)

    def add(self, indices: Sequence[int], gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of some parameters."""
        found = {
            i: local(gradient)
            for i, gradient in zip(indices, gradients)
            if gradient is not None and (not is_sharded(gradient) or _counts_elements(self._parts, i))
        }
        elements = chunk_elements(self._tensors)
        with torch.no_grad():
            for chunk in chunks(self._pieces, self._tensors, self._updates.kinds, elements, only=found):
                if (row := self._rows.get(chunk.block)) is not None:
                    signal = dot(chunk.stack(found), self._updates.of(chunk))
                    self.totals[row] += to_device(signal, self.totals.device)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the float64 sum of products of two tensors of one shape."""
    wide = a.reshape(-1).double()
    return torch.dot(wide, wide if a is b else b.reshape(-1).double())


def _counts_elements(parts: ParameterParts, i: int) -> bool:
    """Return whether this process counts its elements of a parameter. No two processes count the same element."""
    return parts.own(i, local(parts.parameters[i].detach()), None).numel() > 0
