"""The pieces of a model that sharpness is summed over: parameters, and the q, k, v inside fused ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockwise_lr.blocks import Block, BlockMap, canonical_name, classify
from blockwise_lr.blocks.block import Assignment

OUTSIDE = "outside"
"""The layer of parameters that are in none: embedding, head, final norm."""


@dataclass(frozen=True)
class Part:
    """A parameter, or one of the parts of a fused weight that was not split.

    Args:
        name: the parameter's name without wrapper prefixes; with ``:q``, ``:k`` or ``:v`` for a part.
        block: the block it belongs to.
        layer: the name of its layer ("model.layers.3"), or OUTSIDE.
        numel: number of elements, over all processes.
    """

    name: str
    block: Block
    layer: str
    numel: int


class Parts:
    """All trainable parameters of a model in parts, and sums over them.

    Args:
        model: the model, unwrapped.
        blocks: its BlockMap. Default: ``classify(model)``.
        distributed: sum over all processes of the default group although the model is not sharded.

    Raises:
        ValueError: nothing to train; and as :func:`blockwise_lr.classify`.
    """

    def __init__(self, model: nn.Module, blocks: BlockMap | None, *, distributed: bool) -> None:
        blocks = classify(model) if blocks is None else blocks
        self.parameters: list[nn.Parameter] = []
        self.parts: list[Part] = []
        self._pieces: list[list[tuple[int, int, int] | None]] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            entry, name = blocks.assignment(name), canonical_name(name)
            self.parameters.append(parameter)
            pieces: list[tuple[int, int, int] | None] = []
            for suffix, block, piece in _pieces(entry):
                share = piece[2] / parameter.shape[piece[0]] if piece else 1
                numel = round(parameter.numel() * share)
                self.parts.append(Part(name + suffix, block, layer_of(name), numel))
                pieces.append(piece)
            self._pieces.append(pieces)
        if not self.parameters:
            raise ValueError(
                f"{type(model).__name__} has no parameter with requires_grad=True, so there is nothing to measure"
            )
        self.sharded = any(is_sharded(p) for p in self.parameters)
        self.distributed = (distributed or self.sharded) and dist.is_initialized()

    def __len__(self) -> int:
        return len(self.parts)

    def blocks_of_pieces(self) -> list[list[tuple[Block, tuple[int, int, int] | None]]]:
        """For every parameter: the block of each of its pieces, and where it lies (None: all of it)."""
        names = iter(self.parts)
        return [[(next(names).block, piece) for piece in pieces] for pieces in self._pieces]

    def sums(self, tensors: Sequence[Tensor | None], others: Sequence[Tensor | None] | None = None) -> Tensor:
        """The sum of squares of each part, or of products with `others`; in float64, over all shards.

        Args:
            tensors: one per parameter, of its shape; None counts as zero.
            others: the same; or None for squares.

        Returns:
            (parts,) float64, on the CPU.
        """
        totals = []
        for i, pieces in enumerate(self._pieces):
            tensor, other = tensors[i], tensors[i] if others is None else others[i]
            for piece in pieces:
                if tensor is None or other is None:
                    totals.append(torch.zeros((), dtype=torch.float64))
                else:
                    totals.append(_product(cut(tensor, piece), cut(other, piece)))
        return torch.stack([total.to("cpu") for total in totals])

    def sum_over_processes(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients summed over the processes that hold replicas; sharded ones are returned as they are."""
        if not self.distributed or self.sharded:
            return list(tensors)
        summed: list[Tensor | None] = []
        for parameter, tensor in zip(self.parameters, tensors):
            # A parameter without gradient here (an expert that saw no token) may have one elsewhere.
            whole = torch.zeros_like(parameter) if tensor is None else tensor
            whole = whole.detach().to(_accumulation_dtype(whole)).clone()
            dist.all_reduce(whole)
            summed.append(whole)
        return summed


def add(total: list[Tensor | None] | None, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`total` plus `tensors`, one by one; half-precision gradients are added up in float32."""
    if total is None:
        return list(tensors)
    return [
        b if a is None else a if b is None else a.to(_accumulation_dtype(a)) + b
        for a, b in zip(total, tensors)
    ]


def cut(tensor: Tensor, piece: tuple[int, int, int] | None) -> Tensor:
    """The part of a fused weight; of a sharded one, put together first."""
    if piece is None:
        return tensor
    if is_sharded(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return tensor.narrow(*piece)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor (without importing torch.distributed.tensor)."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def layer_of(name: str) -> str:
    """The layer that a parameter is in: its name up to the first number.

    Example:
        >>> layer_of("model.layers.3.mlp.experts.0.weight"), layer_of("lm_head.weight")
        ('model.layers.3', 'outside')
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return OUTSIDE if number is None else ".".join(parts[: number + 1])


def _pieces(entry: Assignment) -> list[tuple[str, Block, tuple[int, int, int] | None]]:
    if entry.block is not Block.QKV or not entry.slices or not entry.parts:
        return [("", entry.block, None)]
    return [(f":{part}", entry.parts[part], piece) for part, piece in entry.slices.items()]


def _product(a: Tensor, b: Tensor) -> Tensor:
    if is_sharded(a):
        total: Tensor = (a.double() * b.double()).sum().full_tensor()  # type: ignore[attr-defined]
        return total
    if a is b:  # one pass without a float64 copy
        norm: Tensor = torch.linalg.vector_norm(a, dtype=torch.float64)
        return norm.square()
    return (a.double() * b.double()).sum()


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
