"""Adam-mini on sharded parameters (DTensors): pieces that lie in several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blockwise_lr.distributed import is_sharded, local
from blockwise_lr.optimizers.adam_mini_kernel import Pieces, move, spread


def is_whole(parameter: Tensor, partition: Sequence[int]) -> bool:
    """Whether each piece lies in one process: a dimension that is sharded is cut at every index."""
    return all(parameter.shape[dim] == partition[dim] for dim, _ in _sharded(parameter))


def _sharded(parameter: Any) -> Iterator[tuple[int, Any]]:
    """The dimensions of the parameter that are sharded, each with its group of processes."""
    if is_sharded(parameter):
        for number, placement in enumerate(parameter.placements):
            if placement.is_shard():
                yield placement.dim % parameter.ndim, parameter.device_mesh.get_group(number)


def sharded_zeros(parameter: Any, partition: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Second moments of a DTensor: sharded as it is where no piece is cut, else whole in every process."""
    if is_whole(parameter, partition):
        from torch.distributed.tensor import zeros

        mesh, placements = parameter.device_mesh, parameter.placements
        return zeros(list(partition), dtype=dtype, device_mesh=mesh, placements=placements)
    return torch.zeros(list(partition), dtype=dtype, device=local(parameter).device)


def _mean_squares(pieces: Sequence[Pieces], indices: Sequence[list[Tensor]]) -> list[Tensor]:
    """The mean of the gradient's square over each piece, over all processes, with one sum for all parameters."""
    sums = [_sums(each, index) for each, index in zip(pieces, indices)]
    by_groups: dict[tuple[int, ...], list[int]] = {}
    groups: dict[int, Any] = {}
    for i, each in enumerate(pieces):
        own = [group for _, group in _sharded(each.parameter)]
        groups.update({id(group): group for group in own})
        by_groups.setdefault(tuple(map(id, own)), []).append(i)
    for key, members in by_groups.items():
        flat = torch.cat([sums[i].flatten() for i in members])
        for group in key:
            dist.all_reduce(flat, group=groups[group])
        for i, part in zip(members, torch.split(flat, [sums[i].numel() for i in members])):
            sums[i] = part.view_as(sums[i])
    return [total.mul_(total.numel() / each.parameter.numel()) for total, each in zip(sums, pieces)]


def _sums(each: Pieces, indices: list[Tensor]) -> Tensor:
    """The sum of the squares of this process's part of the gradient, by piece of the whole parameter."""
    found = each.gradient.to(each.first.dtype).square()
    for dim, (index, pieces) in enumerate(zip(indices, each.partition)):
        if pieces == 1:
            found = found.sum(dim, keepdim=True)
        else:
            shape = [pieces if d == dim else size for d, size in enumerate(found.shape)]
            found = found.new_zeros(shape).index_add_(dim, index, found)
    return found


def _piece_of(parameter: Any, partition: Sequence[int]) -> list[Tensor]:
    """For each dimension, the piece of each index of this process's part."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    return [
        (torch.arange(length, device=local(parameter).device) + start) // (size // pieces)
        for length, start, size, pieces in zip(shape, offset, parameter.shape, partition)
    ]


def local_second(second: Tensor, parameter: Tensor, partition: Sequence[int]) -> Tensor:
    """The second moment of every element of this process's part of a parameter, whole or a DTensor."""
    if is_whole(parameter, partition):
        return spread(local(second), local(parameter).shape)
    return _select_pieces(second, _piece_of(parameter, partition))


def _select_pieces(by_piece: Tensor, index_of: Sequence[Tensor]) -> Tensor:
    """What each index's piece has; a dimension of one piece broadcasts."""
    for dim, index in enumerate(index_of):
        if by_piece.shape[dim] > 1:
            by_piece = by_piece.index_select(dim, index)
    return by_piece


def sharded_step(pieces: Sequence[Pieces]) -> None:
    """The step of parameters whose pieces lie in several processes, which exchange one sum for all of them."""
    indices = [_piece_of(each.parameter, each.partition) for each in pieces]
    for each, index_of, mean in zip(pieces, indices, _mean_squares(pieces, indices)):
        beta1, beta2 = each.betas
        each.second.mul_(beta2).add_(mean, alpha=1 - beta2)
        each.first.lerp_(each.gradient.to(each.first.dtype), 1 - beta1)
        step = each.second.sqrt().mul_(each.root).add_(each.eps).reciprocal_().mul_(-each.rate)
        move(local(each.parameter.detach()), each.first, _select_pieces(step, index_of), each.decay)
