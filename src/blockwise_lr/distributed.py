"""Several processes: counts over all of them, each one's share of the random numbers, and how sharding behaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockwise_lr.blocks.block import PartSlice


def total(count: int, device: torch.device) -> int:
    """The sum over all processes of a number that each of them has."""
    counts = torch.tensor(count, device=device)
    dist.all_reduce(counts)
    return int(counts)


def share(count: int, device: torch.device) -> tuple[int, int]:
    """Where this process's share begins among those of all, in the order of ranks, and the sum of all."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    return int(counts[: dist.get_rank()].sum()), int(counts.sum())


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor (without importing torch.distributed.tensor)."""
    return hasattr(tensor, "full_tensor")


def is_split(tensor: Tensor) -> bool:
    """Whether this process has only a part of it."""
    return is_sharded(tensor) and not all(p.is_replicate() for p in tensor.placements)  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def fully_sharded(model: nn.Module) -> list[Any]:
    """The modules in it that ``fully_shard`` was applied to (without importing torch.distributed.fsdp)."""
    return [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]


def reshard(model: nn.Module) -> None:
    """Give every module its sharded parameters back.

    After a forward pass that no backward pass followed (an evaluation), the outermost module still holds whole ones,
    which are not those that the optimizer knows and that get gradients.
    """
    for module in fully_sharded(model):
        module.reshard()


def recover(model: nn.Module) -> None:
    """The same after an exception, which may have left a forward or backward pass half done."""
    for module in fully_sharded(model):
        if hasattr(module, "reset_iter_state"):
            with suppress(RuntimeError, AttributeError):  # not the outermost one, or it has not run yet
                module.reset_iter_state()
    reshard(model)


def is_tensor_parallel(model: nn.Module, parameters: Sequence[Tensor]) -> bool:
    """Whether parameters are DTensors without ``fully_shard``: every process computes the whole batch's loss."""
    return any(map(is_sharded, parameters)) and not fully_sharded(model)


def check_sharding(model: nn.Module, name: str, parameter: nn.Parameter, *, cut: bool) -> None:
    """Only one kind of parallelism at a time is understood: of data, or of tensors.

    Args:
        cut: only parts of the parameter belong to a block, so it matters which of its elements are where.

    Raises:
        ValueError: the parameter is sharded, but not by ``fully_shard`` over all processes, nor as tensor parallelism
            over all processes does it.
    """
    placements, mesh = parameter.placements, parameter.device_mesh  # type: ignore[attr-defined]
    if fully_sharded(model):  # one dimension, or HSDP's two: replicas of shards
        known = all(placement.is_replicate() for placement in placements[:-1]) and placements[-1].is_shard()
    else:  # what is neither a shard nor whole is a shard in turns: of gate and up, say, of each a stretch
        known = mesh.ndim == 1 and not placements[0].is_partial()
        known = known and not (cut and not (placements[0].is_shard() or placements[0].is_replicate()))
    if not (known and mesh.size() == dist.get_world_size()):
        raise ValueError(
            f"{name} is sharded as {', '.join(map(str, placements))} over {mesh.size()} of "
            f"{dist.get_world_size()} processes; expected fully_shard over all of them, or tensor parallelism alone "
            "over all of them (both together, pipeline and expert parallelism are not supported)"
        )


def sharded_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, sharded as its parameter is.

    Under tensor parallelism that of a sharded embedding is whole in every process, or a sum that is still to be made.
    Collective where it is the latter.
    """
    if not is_sharded(gradient) or gradient.placements == parameter.placements:  # type: ignore[attr-defined]
        return gradient
    return gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined, no-any-return]


def check_same(batch: object, device: torch.device) -> None:
    """Under tensor parallelism all processes have to have the same batch: else what they compute together is nothing.

    Args:
        batch: tensors in mappings and sequences; anything else in it is not compared.
        device: for the exchange.

    Raises:
        ValueError: they differ, on all processes.
    """
    found = torch.tensor(_checksum(batch), dtype=torch.int64, device=device)
    least, most = found.clone(), found
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if least != most:
        raise ValueError(
            "processes have different batches; under tensor parallelism, where they compute one loss together, every "
            "one needs the same"
        )


def _checksum(batch: object) -> int:
    if isinstance(batch, Tensor):
        return crc32(batch.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return crc32(repr([_checksum(each) for each in batch]).encode())
    return 0


def check_replicas(names: Sequence[str], squares: Tensor) -> None:
    """Under tensor parallelism gradients of parameters that are whole have to be the same in all processes.

    Args:
        names: of the parameters.
        squares: (names,) sums of squares of this process's gradients, on the device of the exchange.

    Raises:
        ValueError: they differ, on all processes.
    """
    least, most = squares.clone(), squares.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    apart = (most - least) > 1e-2 * most  # rounding, of half precision at the worst
    if apart.any():
        raise ValueError(
            f"the gradient of {names[int(apart.nonzero()[0])]}, which every process has whole, differs between "
            "processes: under tensor parallelism all need the same batches, and the plan has to sum such gradients "
            "up where each process computes a part of them"
        )


def own_elements(parameter: Tensor, shard: Tensor, piece: PartSlice | None) -> Tensor:
    """What this process's shard holds of a part of the parameter; nothing if another process has the same shard.

    Args:
        parameter: sharded as :func:`check_sharding` wants it.
        shard: this process's, of the parameter or of anything sharded like it.
        piece: where the part lies in the whole parameter, or None for all of it.
    """
    mesh, placement = parameter.device_mesh, parameter.placements[-1]  # type: ignore[attr-defined]
    last = mesh.ndim - 1
    replicas = last + 1 if placement.is_replicate() else last  # HSDP's, or of tensor parallelism
    if any(mesh.get_local_rank(dimension) for dimension in range(replicas)):
        return shard.flatten()[:0]
    if piece is None:
        return shard
    size, first = parameter.shape[piece.dim], 0
    if placement.is_shard(piece.dim):  # all shards but the last ones are of this size
        first = mesh.get_local_rank(last) * -(-size // mesh.size(last))
    places = (torch.arange(shard.shape[piece.dim], device=shard.device) + first) % (size // piece.repeats)
    inside = (places >= piece.start) & (places < piece.start + piece.length)
    return shard.index_select(piece.dim, inside.nonzero().flatten())


def gradient_divisor(model: nn.Module) -> float:
    """What ``fully_shard`` divides the sum of the processes' gradients by: their number, unless it was told otherwise.

    Raises:
        ValueError: the modules divide by different numbers, or do not exchange gradients now.
    """
    groups: list[Any] = []
    for module in fully_sharded(model):
        state = module._get_fsdp_state()  # there is no public way to ask
        groups += getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    if not all(group.reduce_grads and group.all_reduce_grads for group in groups if group):
        raise ValueError(
            "gradients are not exchanged between processes now: call model.set_requires_gradient_sync(True) first"
        )
    divisors = {group.gradient_divide_factor or float(dist.get_world_size()) for group in groups if group}
    if len(divisors) > 1:
        raise ValueError(
            f"modules differ in what set_gradient_divide_factor told them ({', '.join(map(str, sorted(divisors)))}): "
            "give all the same"
        )
    return float(divisors.pop())
