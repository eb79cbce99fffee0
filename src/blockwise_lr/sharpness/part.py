"""Part: a piece of a parameter that belongs to one block, and how to cut it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockwise_lr.blocks import Block
from blockwise_lr.blocks.block import Assignment, PartSlice
from blockwise_lr.distributed import is_sharded

OUTSIDE = "outside"
"""The layer name of parameters outside all layers: embedding, head, final norm."""


@dataclass(frozen=True)
class Part:
    """A parameter, or one of q, k and v in a fused weight that is not split.

    Args:
        name: the parameter's name without wrapper prefixes; ``:q``, ``:k`` or ``:v`` is appended in a fused weight.
        block: the block of the part.
        layer: the name of its layer ("model.layers.3"), or OUTSIDE.
        numel: number of elements, over all processes.
    """

    name: str
    block: Block
    layer: str
    numel: int


def cut(tensor: Tensor, part_slice: PartSlice | None) -> Tensor:
    """Return one part of a tensor, usually as a view.

    Args:
        tensor: a tensor of a parameter's shape. A sharded one is gathered first.
        part_slice: the slice of the part; None returns the tensor. If the slice repeats, the view has an extra
            dimension for the repeats.
    """
    if part_slice is None:
        return tensor
    if is_sharded(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    dim, start, length, repeats = part_slice
    if repeats == 1:
        return tensor.narrow(dim, start, length)
    return torch.unflatten(tensor, dim, (repeats, -1)).narrow(dim + 1, start, length)


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its name up to the first number, or OUTSIDE.

    Example:
        >>> layer_of("model.layers.3.mlp.experts.0.weight"), layer_of("lm_head.weight")
        ('model.layers.3', 'outside')
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return OUTSIDE if number is None else ".".join(parts[: number + 1])


def slices_of(entry: Assignment) -> list[tuple[str, Block, PartSlice | None]]:
    """Return (suffix, block, slice) of every part of a parameter."""
    if entry.block is not Block.QKV or not entry.slices or not entry.parts:
        return [("", entry.block, None)]
    return [(f":{part}", entry.parts[part], part_slice) for part, part_slice in entry.slices.items()]
