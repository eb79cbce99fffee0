"""ParameterParts: the trainable parameters of a model in parts, and sums over each part.

A fused weight that is not split consists of the parts q, k and v. Any other parameter is a single part.
"""

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

_CHUNK = 1 << 20  # elements multiplied at a time
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


class ParameterParts:
    """All trainable parameters of a model in parts, and sums over each part.

    Args:
        model: the unwrapped model.
        blocks: its BlockMap; None: ``classify(model)``.
        distributed: sum over all processes of the default group although the model is not sharded.

    Attributes:
        parameters: all trainable parameters that have elements, in the order of ``model.named_parameters()``. A shared
            parameter occurs once.
        names: their names, without wrapper prefixes.
        parts: the parts of all parameters, in the same order.
        sharded: whether some parameters are DTensors.
        tensor_parallel: whether they are DTensors of tensor parallelism. Every process has the whole batch then.
        distributed: whether each process has its own share of the batch, so that sums are over several processes.
        divisor: what ``backward()`` of a sharded model divides the sum of the processes' gradients by.

    Raises:
        ValueError: no parameter is trainable; one is complex; one is sharded otherwise than by ``fully_shard`` or by
            tensor parallelism over all processes; or `distributed` is set under tensor parallelism. Also the errors of
            :func:`blockwise_lr.classify`.
    """

    def __init__(self, model: nn.Module, blocks: BlockMap | None, *, distributed: bool) -> None:
        blocks = classify(model) if blocks is None else blocks
        self.parameters: list[nn.Parameter] = []
        self.names: list[str] = []
        self.parts: list[Part] = []
        self._slices: list[list[PartSlice | None]] = []
        for name, parameter in model.named_parameters():
            if not (parameter.requires_grad and parameter.numel()):
                continue
            entry, name = blocks.assignment(name), canonical_name(name)
            if is_sharded(parameter):
                check_sharding(model, name, parameter, cut=bool(entry.slices))
            self.parameters.append(parameter)
            self.names.append(name)
            slices: list[PartSlice | None] = []
            for suffix, block, part_slice in _slices(entry):
                share = (
                    part_slice.length * part_slice.repeats / parameter.shape[part_slice.dim]
                    if part_slice
                    else 1
                )
                numel = round(parameter.numel() * share)
                self.parts.append(Part(name + suffix, block, layer_of(name), numel))
                slices.append(part_slice)
            self._slices.append(slices)
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

    def blocks_and_slices(self) -> list[list[tuple[Block, PartSlice | None]]]:
        """Return for every parameter its parts: each one's block, and its slice (None: the whole parameter)."""
        names = iter(self.parts)
        return [[(next(names).block, part_slice) for part_slice in slices] for slices in self._slices]

    def sums(self, tensors: Sequence[Tensor | None], others: Sequence[Tensor | None] | None = None) -> Tensor:
        """Return the sum of squares of each part, or of products with `others`, over all shards.

        Args:
            tensors: one for each parameter, of its shape; None counts as zero.
            others: the same; None: sum squares. Default: None.

        Returns:
            (parts,) float64, on the CPU.
        """
        totals = []
        for i, slices in enumerate(self._slices):
            tensor, other = tensors[i], tensors[i] if others is None else others[i]
            for part_slice in slices:
                if tensor is None or other is None:
                    totals.append(torch.zeros((), dtype=torch.float64))
                else:
                    first = self.own(i, tensor, part_slice)
                    totals.append(
                        _product(first, first if others is None else self.own(i, other, part_slice))
                    )
        found = torch.stack([total.to("cpu") for total in totals])
        if self.sharded:
            found = found.to(self.parameters[0].device)
            dist.all_reduce(found)
        return found.cpu()

    def own(self, i: int, tensor: Tensor, part_slice: PartSlice | None) -> Tensor:
        """Return the elements of one part that this process counts. No two processes count the same element.

        Args:
            i: index of the parameter.
            tensor: a tensor of the parameter's shape, or this process's shard of one.
            part_slice: the slice of the part, from :meth:`blocks_and_slices`.
        """
        if is_sharded(self.parameters[i]):
            return own_elements(self.parameters[i], local(tensor), part_slice)
        elements = cut(tensor, part_slice)
        return elements.flatten()[:0] if self.sharded and dist.get_rank() else elements

    def check_dense(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients as a list.

        Raises:
            UnsupportedGradientError: one of them is sparse; the message names its parameter.
        """
        for name, gradient in zip(self.names, gradients):
            if gradient is not None:
                check_gradient(name, gradient, "sharpness")
        return list(gradients)

    def check_replicas(self, gradients: Sequence[Tensor | None]) -> None:
        """Check, under tensor parallelism, that all processes have equal gradients of unsharded parameters.

        Raises:
            ValueError: they differ.
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
        """Return the gradients, summed over processes where the parameter is not sharded."""
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
    """Return `total` plus `tensors`, one by one. Half-precision gradients are added in float32."""
    if total is None:
        return list(tensors)
    return [
        b if a is None else a if b is None else a.to(accumulation_dtype(a)) + b
        for a, b in zip(total, tensors)
    ]


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


def _slices(entry: Assignment) -> list[tuple[str, Block, PartSlice | None]]:
    """Return (suffix, block, slice) of every part of a parameter."""
    if entry.block is not Block.QKV or not entry.slices or not entry.parts:
        return [("", entry.block, None)]
    return [(f":{part}", entry.parts[part], part_slice) for part, part_slice in entry.slices.items()]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the float64 sum of products of two tensors."""
    if a is b:
        return _squares(a)
    a, b = a.reshape(-1), b.reshape(-1)
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(a) or 1, _CHUNK)]
    products = [(a[chunk].double() * b[chunk].double()).sum() for chunk in chunks]
    return torch.stack(products).sum()


def _squares(tensor: Tensor) -> Tensor:
    """Return the sum of squares. In large tensors, 256 neighbours are added in float32, without a float64 copy.

    The relative errors of these short sums are 1e-7 and of both signs, so the error of the total is 1e-8 or less.
    """
    flat = tensor.reshape(-1)
    whole = len(flat) // 256 * 256 if len(flat) > 1 << 16 else 0
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, 256), dim=1, dtype=accumulation_dtype(tensor))
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)
    total: Tensor = norms.double().square().sum() + rest.square()
    return total


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which to add such tensors: float32 for half precision, otherwise their own."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
