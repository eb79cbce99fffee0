"""The pieces of a model that sharpness is summed over: parameters, and the q, k, v inside fused ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockwise_lr.blocks import Block, BlockMap, canonical_name, classify
from blockwise_lr.blocks.block import Assignment, PartSlice
from blockwise_lr.distributed import (
    check_replicas,
    check_sharding,
    gradient_divisor,
    is_sharded,
    is_tensor_parallel,
    local,
    own_elements,
)
from blockwise_lr.sharpness.gradient_checks import check_gradient, check_real

__all__ = [
    "OUTSIDE",
    "ParameterParts",
    "Part",
    "accumulation_dtype",
    "add",
    "cut",
    "is_sharded",
    "layer_of",
    "local",
]

_CHUNK = 1 << 20  # elements multiplied at a time
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


class ParameterParts:
    """All trainable parameters of a model in parts, and sums over them.

    Args:
        model: the model, unwrapped.
        blocks: its BlockMap. Default: ``classify(model)``.
        distributed: sum over all processes of the default group although the model is not sharded.

    Attributes:
        parameters: all trainable ones that have elements, in the order of ``model.named_parameters()``; shared ones
            once.
        names: theirs, without wrapper prefixes.
        parts: what they consist of, in the same order.
        sharded: whether some are DTensors.
        tensor_parallel: whether they are DTensors of tensor parallelism: every process has the whole batch.
        distributed: whether each process has its own share of the batch, so that sums are over several.
        divisor: what ``backward()`` of a sharded model divides the sum of the processes' gradients by.

    Raises:
        ValueError: nothing to train; a complex parameter; parameters sharded otherwise than by ``fully_shard`` or
            tensor parallelism over all processes; `distributed` under tensor parallelism; and as
            :func:`blockwise_lr.classify`.
    """

    def __init__(self, model: nn.Module, blocks: BlockMap | None, *, distributed: bool) -> None:
        blocks = classify(model) if blocks is None else blocks
        self.parameters: list[nn.Parameter] = []
        self.names: list[str] = []
        self.parts: list[Part] = []
        self._pieces: list[list[PartSlice | None]] = []
        for name, parameter in model.named_parameters():
            if not (parameter.requires_grad and parameter.numel()):
                continue
            entry, name = blocks.assignment(name), canonical_name(name)
            if is_sharded(parameter):
                check_sharding(model, name, parameter, cut=bool(entry.slices))
            self.parameters.append(parameter)
            self.names.append(name)
            pieces: list[PartSlice | None] = []
            for suffix, block, piece in _pieces(entry):
                share = piece.length * piece.repeats / parameter.shape[piece.dim] if piece else 1
                numel = round(parameter.numel() * share)
                self.parts.append(Part(name + suffix, block, layer_of(name), numel))
                pieces.append(piece)
            self._pieces.append(pieces)
            check_real(name, parameter, "sharpness")
        if not self.parameters:
            raise ValueError(
                f"{type(model).__name__} has no parameter with requires_grad=True, so there is nothing to measure"
            )
        self.sharded = any(is_sharded(p) for p in self.parameters)
        self.tensor_parallel = is_tensor_parallel(model, self.parameters)
        if distributed and self.tensor_parallel:
            raise ValueError(
                "a model under tensor parallelism is measured with the same batches on every process, not with shares "
                "of them: leave out DDP and distributed=True"
            )
        by_data = self.sharded and not self.tensor_parallel
        self.distributed = (distributed or by_data) and dist.is_initialized()
        self.divisor = gradient_divisor(model) if by_data else 1.0

    def __len__(self) -> int:
        return len(self.parts)

    def blocks_of_pieces(self) -> list[list[tuple[Block, PartSlice | None]]]:
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
                    first = self.own(i, tensor, piece)
                    totals.append(_product(first, first if others is None else self.own(i, other, piece)))
        found = torch.stack([total.to("cpu") for total in totals])
        if self.sharded:
            found = found.to(self.parameters[0].device)
            dist.all_reduce(found)
        return found.cpu()

    def own(self, i: int, tensor: Tensor, piece: PartSlice | None) -> Tensor:
        """The elements of one piece that this process counts; if the model is sharded, each element has one process.

        Args:
            i: index of the parameter.
            tensor: of its shape, or this process's shard of such a one.
            piece: as from :meth:`blocks_of_pieces`.
        """
        if is_sharded(self.parameters[i]):
            return own_elements(self.parameters[i], local(tensor), piece)
        elements = cut(tensor, piece)
        return elements.flatten()[:0] if self.sharded and dist.get_rank() else elements

    def check_dense(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients as a list. Raises ValueError, which names the parameter: one of them is sparse."""
        for name, gradient in zip(self.names, gradients):
            if gradient is not None:
                check_gradient(name, gradient, "sharpness")
        return list(gradients)

    def check_replicas(self, gradients: Sequence[Tensor | None]) -> None:
        """Under tensor parallelism: that processes do not differ in the gradients of which each has the whole.

        Raises:
            ValueError: they do.
        """
        if not self.tensor_parallel:
            return
        pairs = [
            (name, gradient)
            for name, parameter, gradient in zip(self.names, self.parameters, gradients)
            if gradient is not None and not is_sharded(parameter)
        ]
        if pairs:
            squares = torch.stack([_squares(gradient) for _, gradient in pairs])
            check_replicas([name for name, _ in pairs], squares)

    def sum_over_processes(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients summed over the processes that hold replicas; sharded ones are returned as they are."""
        if not self.distributed:
            return list(tensors)
        summed: list[Tensor | None] = []
        for parameter, tensor in zip(self.parameters, tensors):
            if is_sharded(parameter):
                summed.append(tensor)
                continue
            # A parameter without gradient here (an expert that saw no token) may have one elsewhere.
            whole = torch.zeros_like(parameter) if tensor is None else tensor
            whole = whole.detach().to(accumulation_dtype(whole)).clone()
            dist.all_reduce(whole)
            summed.append(whole)
        return summed


def add(total: list[Tensor | None] | None, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`total` plus `tensors`, one by one; half-precision gradients are added up in float32."""
    if total is None:
        return list(tensors)
    return [
        b if a is None else a if b is None else a.to(accumulation_dtype(a)) + b
        for a, b in zip(total, tensors)
    ]


def cut(tensor: Tensor, piece: PartSlice | None) -> Tensor:
    """The part of a fused weight, a view in which stretches of it have a dimension of their own if there are several.

    Of a sharded tensor, put together first.
    """
    if piece is None:
        return tensor
    if is_sharded(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    dim, start, length, repeats = piece
    if repeats == 1:
        return tensor.narrow(dim, start, length)
    return torch.unflatten(tensor, dim, (repeats, -1)).narrow(dim + 1, start, length)


def layer_of(name: str) -> str:
    """The layer that a parameter is in: its name up to the first number.

    Example:
        >>> layer_of("model.layers.3.mlp.experts.0.weight"), layer_of("lm_head.weight")
        ('model.layers.3', 'outside')
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return OUTSIDE if number is None else ".".join(parts[: number + 1])


def _pieces(entry: Assignment) -> list[tuple[str, Block, PartSlice | None]]:
    if entry.block is not Block.QKV or not entry.slices or not entry.parts:
        return [("", entry.block, None)]
    return [(f":{part}", entry.parts[part], piece) for part, piece in entry.slices.items()]


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a is b:
        return _squares(a)
    a, b = a.reshape(-1), b.reshape(-1)
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(a) or 1, _CHUNK)]
    products = [(a[chunk].double() * b[chunk].double()).sum() for chunk in chunks]
    return torch.stack(products).sum()


def _squares(tensor: Tensor) -> Tensor:
    """The sum of squares, in large tensors without a float64 copy: there 256 neighbours are added up in float32.

    The relative errors of these short sums are 1e-7 and of both signs, so that 1e-8 or less remains of them.
    """
    flat = tensor.reshape(-1)
    whole = len(flat) // 256 * 256 if len(flat) > 1 << 16 else 0
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, 256), dim=1, dtype=accumulation_dtype(tensor))
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)
    total: Tensor = norms.double().square().sum() + rest.square()
    return total


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """What to add such tensors up in: float32 for those of half precision."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
