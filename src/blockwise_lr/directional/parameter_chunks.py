"""Chunks: equal slices of parameters, so that few kernels serve all parameters and little memory serves all chunks."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockwise_lr.blocks import Block
from blockwise_lr.blocks.block import PartSlice
from blockwise_lr.sharpness.parameter_parts import cut

_SHARE = (
    128  # a chunk has at most 1/128 of all elements, because the arithmetic on it needs some copies of it
)
# Smallest and largest chunk. On a CPU, a few copies of a chunk fit into the cache. On a GPU, a chunk is large enough
# that a kernel takes longer than its launch.
_CPU_ELEMENTS = (1 << 14, 1 << 18)
_GPU_ELEMENTS = (1 << 20, 1 << 24)


@dataclass(frozen=True)
class Chunk:
    """The same slice of several parameters that are alike, or a part of one large parameter.

    Args:
        block: the block of all these slices.
        indices: the parameters. They have one shape, dtype and device, and one kind (:func:`chunks`).
        part: the part of each parameter that belongs to the block; None: the whole parameter.
        rows: start and length along the first dimension of the part; None: all rows.
    """

    block: Block
    indices: tuple[int, ...]
    part: PartSlice | None = None
    rows: tuple[int, int] | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """Return this slice of one tensor in the shape of a parameter."""
        found = cut(tensor, self.part)
        return found if self.rows is None else found.narrow(0, *self.rows)

    def stack(self, tensors: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
        """Return the slices as one tensor, (number of parameters, *shape of a slice).

        Args:
            tensors: one for each parameter of the model, in its shape. The result is a view if the chunk has one
                parameter.
        """
        return stacked([self.view(tensors[i]) for i in self.indices])


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors along a new first dimension. A single tensor is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def chunk_elements(tensors: Sequence[Tensor]) -> int:
    """Return the largest number of elements of a chunk."""
    least, most = _CPU_ELEMENTS if tensors[0].device.type == "cpu" else _GPU_ELEMENTS
    return min(max(sum(tensor.numel() for tensor in tensors) // _SHARE, least), most)


def chunks(
    parts: Sequence[Sequence[tuple[Block, PartSlice | None]]],
    tensors: Sequence[Tensor],
    kinds: Sequence[Hashable],
    elements: int,
    only: Collection[int] | None = None,
) -> Iterator[Chunk]:
    """Yield chunks that cover the parameters. Their number does not depend on the number of layers.

    Args:
        parts: for each parameter its blocks and slices, as :meth:`ParameterParts.blocks_and_slices` returns them.
        tensors: this process's shard of each parameter.
        kinds: only parameters of the same kind share a chunk.
        elements: the largest number of elements of a chunk. A single row may have more.
        only: indices of the parameters to cover. Default: all.
    """
    alike: dict[Hashable, tuple[Block, PartSlice | None, list[int]]] = {}
    for i in range(len(tensors)) if only is None else only:
        tensor = tensors[i]
        if not tensor.numel():
            continue
        for block, part in parts[i]:
            key = (block, part, tensor.shape, tensor.dtype, tensor.device, kinds[i])
            alike.setdefault(key, (block, part, []))[2].append(i)
    for block, part, indices in alike.values():
        shape = cut(tensors[indices[0]], part).shape
        if shape.numel() <= elements:
            count = max(1, elements // shape.numel())
            for start in range(0, len(indices), count):
                yield Chunk(block, tuple(indices[start : start + count]), part)
            continue
        length = max(1, elements // shape[1:].numel())
        for i in indices:
            for start in range(0, shape[0], length):
                yield Chunk(block, (i,), part, (start, min(length, shape[0] - start)))
