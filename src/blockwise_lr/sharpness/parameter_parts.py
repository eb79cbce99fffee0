"""ParameterParts: the trainable parameters of a model in parts, and sums over each part.

A fused weight that is not split consists of the parts q, k and v. Any other parameter is a single part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockwise_lr.blocks import Block, BlockMap, canonical_name, classify
from blockwise_lr.blocks.block import PartSlice
from blockwise_lr.distributed import (
    check_replicas,
    check_sharding,
    gradient_divisor,
    is_sharded,
    is_tensor_parallel,
    local,
    own_elements,
)
from blockwise_lr.sharpness.exchanged_gradients import summed_in_groups
from blockwise_lr.sharpness.gradient_checks import check_gradient, check_real
from blockwise_lr.sharpness.part import OUTSIDE as OUTSIDE
from blockwise_lr.sharpness.part import Part as Part
from blockwise_lr.sharpness.part import cut as cut
from blockwise_lr.sharpness.part import layer_of as layer_of
from blockwise_lr.sharpness.part import slices_of
from blockwise_lr.sharpness.tensor_sums import sum_of_products, sums_of_squares, to_device


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
        self._first: list[int] = []  # the index of each parameter's first part
        for name, parameter in model.named_parameters():
            if not (parameter.requires_grad and parameter.numel()):
                continue
            entry, name = blocks.assignment(name), canonical_name(name)
            if is_sharded(parameter):
                check_sharding(model, name, parameter, cut=bool(entry.slices))
            self.parameters.append(parameter)
            self.names.append(name)
            slices: list[PartSlice | None] = []
            for suffix, block, part_slice in slices_of(entry):
                share = (
                    part_slice.length * part_slice.repeats / parameter.shape[part_slice.dim]
                    if part_slice
                    else 1
                )
                numel = round(parameter.numel() * share)
                self.parts.append(Part(name + suffix, block, layer_of(name), numel))
                slices.append(part_slice)
            self._first.append(len(self.parts) - len(slices))
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

    def owners(self) -> Tensor:
        """Return the index of each part's parameter, on the CPU."""
        return torch.tensor([i for i, slices in enumerate(self._slices) for _ in slices])

    @property
    def elements_at_a_time(self) -> int:
        """A sixteenth of all elements: what a measurement may keep of an update or a gradient at a time."""
        return sum(parameter.numel() for parameter in self.parameters) // 16

    def in_groups(self) -> list[list[int]]:
        """Return the indices of the parameters in groups of :attr:`elements_at_a_time`, or one larger parameter."""
        groups: list[list[int]] = [[]]
        limit, size = self.elements_at_a_time, 0
        for i, parameter in enumerate(self.parameters):
            if groups[-1] and size + parameter.numel() > limit:
                groups.append([])
                size = 0
            groups[-1].append(i)
            size += parameter.numel()
        return groups

    def sums(self, tensors: Sequence[Tensor | None], others: Sequence[Tensor | None] | None = None) -> Tensor:
        """Return the sum of squares of each part, or of products with `others`, over all shards.

        The host waits for the device once.

        Args:
            tensors: one for each parameter, of its shape; None counts as zero.
            others: the same; None: sum squares. Default: None.

        Returns:
            (parts,) float64, on the CPU.
        """
        totals = torch.zeros(len(self.parts), dtype=torch.float64, device=self.parameters[0].device)
        if others is None:
            self.add_squares(range(len(tensors)), tensors, totals)
        else:
            self.add_products(tensors, others, totals)
        return self.over_shards(totals).cpu()

    def add_squares(self, indices: Sequence[int], tensors: Sequence[Tensor | None], totals: Tensor) -> None:
        """Add the sums of squares of some parameters to the totals of their parts, without a host sync.

        Args:
            indices: indices of the parameters.
            tensors: one for each index, of the parameter's shape; None counts as zero.
            totals: (parts,) float64, of the shards on this process. Changed in place.
        """
        views: list[Tensor] = []
        owners: list[int] = []
        for i, tensor in zip(indices, tensors):
            if tensor is not None:
                views += [self.own(i, tensor, part_slice) for part_slice in self._slices[i]]
                owners += range(self._first[i], self._first[i] + len(self._slices[i]))
        sums_of_squares(views, owners, totals)

    def add_products(
        self, tensors: Sequence[Tensor | None], others: Sequence[Tensor | None], totals: Tensor
    ) -> None:
        """Add the sums of products of all parameters to the totals of their parts, without a host sync.

        Args:
            tensors, others: as in :meth:`sums`.
            totals: as in :meth:`add_squares`.
        """
        for i, (tensor, other) in enumerate(zip(tensors, others)):
            for part, part_slice in enumerate(self._slices[i], start=self._first[i]):
                if tensor is not None and other is not None:
                    product = sum_of_products(self.own(i, tensor, part_slice), self.own(i, other, part_slice))
                    totals[part] += to_device(product, totals.device)

    def over_shards(self, totals: Tensor) -> Tensor:
        """Return the totals of this process's shards, summed over all processes that hold shards."""
        if self.sharded:
            dist.all_reduce(totals)
        return totals

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
            names, found = zip(*pairs)
            squares = torch.zeros(len(pairs), dtype=torch.float64, device=found[0].device)
            sums_of_squares(found, range(len(found)), squares)
            check_replicas(names, squares)

    def sum_over_processes(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients, summed over processes where the parameter is not sharded."""
        summed = list(tensors)
        for indices, group in self.in_groups_over_processes(tensors):
            for i, tensor in zip(indices, group):
                summed[i] = tensor
        return summed

    def in_groups_over_processes(
        self, tensors: Sequence[Tensor | None]
    ) -> Iterator[tuple[Sequence[int], Sequence[Tensor | None]]]:
        """Yield indices and gradients in groups, summed over processes where the parameter is not sharded."""
        if self.distributed:
            return summed_in_groups(self.parameters, tensors)
        return iter([(range(len(tensors)), tensors)])
