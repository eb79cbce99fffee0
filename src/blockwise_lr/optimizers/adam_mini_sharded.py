"""Adam-mini on sharded parameters (DTensors) whose pieces lie in several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blockwise_lr.distributed import is_sharded, local
from blockwise_lr.optimizers.adam_mini_views import StepInputs, spread


def is_whole(parameter: Tensor, partition: Sequence[int]) -> bool:
    """Return whether each piece lies in one process: along each sharded dimension, a piece is one index."""
    return all(parameter.shape[dim] == partition[dim] for dim, _ in _sharded(parameter))


def _sharded(parameter: Any) -> Iterator[tuple[int, Any]]:
    """Yield each sharded dimension of the parameter with its process group."""
    if is_sharded(parameter):
        for number, placement in enumerate(parameter.placements):
            if placement.is_shard():
                yield placement.dim % parameter.ndim, parameter.device_mesh.get_group(number)


def sharded_zeros(parameter: Any, partition: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the initial second moments of a DTensor.

    They are sharded like the parameter if no piece crosses processes, otherwise every process has all of them.
    """
    if is_whole(parameter, partition):
        from torch.distributed.tensor import zeros

        mesh, placements = parameter.device_mesh, parameter.placements
        return zeros(list(partition), dtype=dtype, device_mesh=mesh, placements=placements)
    return torch.zeros(list(partition), dtype=dtype, device=local(parameter).device)


def _mean_squares(inputs: Sequence[StepInputs], indices: Sequence[list[Tensor]]) -> list[Tensor]:
    """Return the mean of the squared gradient over each piece, over all processes.

    One collective call per process group serves all parameters.
    """
    sums = [_sums(each, index) for each, index in zip(inputs, indices)]
    by_groups: dict[tuple[int, ...], list[int]] = {}
    groups: dict[int, Any] = {}
    for i, each in enumerate(inputs):
        own = [group for _, group in _sharded(each.parameter)]
        groups.update({id(group): group for group in own})
        by_groups.setdefault(tuple(map(id, own)), []).append(i)
    for key, members in by_groups.items():
        flat = torch.cat([sums[i].flatten() for i in members])
        for group in key:
            dist.all_reduce(flat, group=groups[group])
        for i, part in zip(members, torch.split(flat, [sums[i].numel() for i in members])):
            sums[i] = part.view_as(sums[i])
    return [total.mul_(total.numel() / each.parameter.numel()) for total, each in zip(sums, inputs)]


def _sums(each: StepInputs, indices: list[Tensor]) -> Tensor:
    """Return the sum of the squares of this process's shard of the gradient, for each piece of the whole parameter."""
    found = each.gradient.to(each.first.dtype).square()
    for dim, (index, pieces) in enumerate(zip(indices, each.partition)):
        if pieces == 1:
            found = found.sum(dim, keepdim=True)
        else:
            shape = [pieces if d == dim else size for d, size in enumerate(found.shape)]
            found = found.new_zeros(shape).index_add_(dim, index, found)
    return found


def _piece_of(parameter: Any, partition: Sequence[int]) -> list[Tensor]:
    """Return, for each dimension, the piece of each index of this process's shard."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    return [
        (torch.arange(length, device=local(parameter).device) + start) // (size // pieces)
        for length, start, size, pieces in zip(shape, offset, parameter.shape, partition)
    ]


def local_second(second: Tensor, parameter: Tensor, partition: Sequence[int]) -> Tensor:
    """Return the second moment of every element of this process's shard of a parameter.

    Args:
        second: second moments by piece.
        parameter: the parameter, sharded or not.
        partition: number of pieces along each dimension of the whole parameter.
    """
    if is_whole(parameter, partition):
        return spread(local(second), local(parameter).shape)
    return _select_pieces(second, _piece_of(parameter, partition))


def _select_pieces(by_piece: Tensor, index_of: Sequence[Tensor]) -> Tensor:
    """Return the value of the piece of each index. A dimension with one piece broadcasts."""
    for dim, index in enumerate(index_of):
        if by_piece.shape[dim] > 1:
            by_piece = by_piece.index_select(dim, index)
    return by_piece


def sharded_step(inputs: Sequence[StepInputs]) -> None:
    """Update parameters whose pieces lie in several processes."""
    indices = [_piece_of(each.parameter, each.partition) for each in inputs]
    for each, index_of, mean in zip(inputs, indices, _mean_squares(inputs, indices)):
        beta1, beta2 = each.betas
        each.second.mul_(beta2).add_(mean, alpha=1 - beta2)
        gradient = each.gradient.to(each.first.dtype)
        each.first.lerp_(-gradient if each.maximize else gradient, 1 - beta1)
        step = each.second.sqrt().mul_(each.root).add_(each.eps).reciprocal_().mul_(-each.rate)
        _move(local(each.parameter.detach()), each.first, _select_pieces(step, index_of), each.decay)


def _move(parameter: Tensor, first: Tensor, step: Tensor, decay: float) -> None:
    """Compute parameter <- decay * parameter + step * first, in float32 or higher precision."""
    if parameter.dtype == first.dtype:
        parameter.mul_(decay).addcmul_(first, step)
    else:
        parameter.copy_(parameter.to(first.dtype).mul_(decay).addcmul_(first, step))
