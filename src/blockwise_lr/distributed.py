"""Several processes: sums over all of them, their shares of the random numbers, and properties of sharded models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockwise_lr.blocks.block import PartSlice


def sum_over_ranks(count: int, device: torch.device) -> int:
    """Return the sum of each process's `count`. Collective."""
    counts = torch.tensor(count, device=device)
    dist.all_reduce(counts)
    return int(counts)


def offset_and_total(count: int, device: torch.device) -> tuple[int, int]:
    """Return the sum of `count` over the lower ranks, and over all ranks. Collective."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    return int(counts[: dist.get_rank()].sum()), int(counts.sum())


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing torch.distributed.tensor."""
    return hasattr(tensor, "full_tensor")


def is_split(tensor: Tensor) -> bool:
    """Return whether this process holds only a part of the tensor."""
    return is_sharded(tensor) and not all(p.is_replicate() for p in tensor.placements)  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def fully_sharded(model: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was applied to, without importing torch.distributed.fsdp."""
    return [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]


def reshard(model: nn.Module) -> None:
    """Reshard the parameters of every module.

    After a forward pass without a backward pass (an evaluation), the outermost module still holds gathered
    parameters. The optimizer does not know these, and they get no gradients.
    """
    for module in fully_sharded(model):
        module.reshard()


def reset_after_error(model: nn.Module) -> None:
    """Reset and reshard every module after an exception in a forward or backward pass."""
    for module in fully_sharded(model):
        if hasattr(module, "reset_iter_state"):
            with suppress(RuntimeError, AttributeError):  # raised by inner modules, and before the first run
                module.reset_iter_state()
    reshard(model)


def is_tensor_parallel(model: nn.Module, parameters: Sequence[Tensor]) -> bool:
    """Return whether parameters are DTensors without ``fully_shard``, so every process has the whole batch."""
    return any(map(is_sharded, parameters)) and not fully_sharded(model)


def check_sharding(model: nn.Module, name: str, parameter: nn.Parameter, *, cut: bool) -> None:
    """Check that a parameter is sharded by one supported kind of parallelism: of data, or of tensors.

    Args:
        model: the model.
        name: name of the parameter, for the message.
        parameter: a sharded parameter.
        cut: whether several parts of the parameter are measured, so the position of its elements matters.

    Raises:
        ValueError: the parameter is sharded neither by ``fully_shard`` nor by tensor parallelism over all processes.
    """
    placements, mesh = parameter.placements, parameter.device_mesh  # type: ignore[attr-defined]
    if fully_sharded(model):  # a mesh of one dimension, or of two with HSDP: replicas of shards
        known = all(placement.is_replicate() for placement in placements[:-1]) and placements[-1].is_shard()
    else:  # a placement that is neither a shard nor a replica interleaves shards, for example of gate and up
        known = mesh.ndim == 1 and not placements[0].is_partial()
        known = known and not (cut and not (placements[0].is_shard() or placements[0].is_replicate()))
    if not (known and mesh.size() == dist.get_world_size()):
        raise ValueError(
            f"{name} is sharded as {', '.join(map(str, placements))} over {mesh.size()} of "
            f"{dist.get_world_size()} processes; expected fully_shard over all of them, or tensor parallelism alone "
            "over all of them (both together, pipeline and expert parallelism are not supported)"
        )


def sharded_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient, sharded like its parameter.

    Under tensor parallelism, the gradient of a sharded embedding is replicated, or a partial sum on each process.
    The call is collective in the latter case.
    """
    if not is_sharded(gradient) or gradient.placements == parameter.placements:  # type: ignore[attr-defined]
        return gradient
    return gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined, no-any-return]


def check_same_batch(batch: object, device: torch.device) -> None:
    """Check, under tensor parallelism, that all processes have the same batch. Collective.

    Args:
        batch: tensors in mappings and sequences. Anything else in it is not compared.
        device: the device for the exchange.

    Raises:
        ValueError: the batches differ. All processes raise it.
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
    """Return a checksum of the tensors in a batch."""
    if isinstance(batch, Tensor):
        return crc32(batch.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return crc32(repr([_checksum(each) for each in batch]).encode())
    return 0


def check_replicas(names: Sequence[str], squares: Tensor) -> None:
    """Check, under tensor parallelism, that the gradients of replicated parameters are equal. Collective.

    Args:
        names: names of the parameters.
        squares: (names,) sums of squares of this process's gradients, on the device for the exchange.

    Raises:
        ValueError: they differ. All processes raise it.
    """
    least, most = squares.clone(), squares.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    apart = (most - least) > 1e-2 * most  # tolerates the rounding of half precision
    if apart.any():
        raise ValueError(
            f"the gradient of {names[int(apart.nonzero()[0])]}, which every process has whole, differs between "
            "processes: under tensor parallelism all need the same batches, and the plan has to sum such gradients "
            "up where each process computes a part of them"
        )


def own_elements(parameter: Tensor, shard: Tensor, part_slice: PartSlice | None) -> Tensor:
    """Return the elements of one part of a parameter in this process's shard.

    If several processes have the same shard, all but the first return nothing.

    Args:
        parameter: sharded as :func:`check_sharding` requires.
        shard: this process's shard of the parameter, or of a tensor that is sharded like it.
        part_slice: the slice of the part in the whole parameter; None: the whole parameter.
    """
    mesh, placement = parameter.device_mesh, parameter.placements[-1]  # type: ignore[attr-defined]
    last = mesh.ndim - 1
    replicas = last + 1 if placement.is_replicate() else last  # the replicas of HSDP or of tensor parallelism
    if any(mesh.get_local_rank(dimension) for dimension in range(replicas)):
        return shard.flatten()[:0]
    if part_slice is None:
        return shard
    # Ranges are computed on the host: an index on the device would make the host wait for its length.
    dim, start, length, repeats = part_slice
    size, here, first = parameter.shape[dim], shard.shape[dim], 0
    if placement.is_shard(dim):  # the size of every shard except the last ones
        first = mesh.get_local_rank(last) * -(-size // mesh.size(last))
    period = size // repeats
    starts = [repeat * period + start - first for repeat in range(repeats)]
    ranges = [(max(at, 0), min(at + length, here)) for at in starts]
    pieces = [shard.narrow(dim, low, high - low) for low, high in ranges if low < high]
    if not pieces:
        return shard.flatten()[:0]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def gradient_divisor(model: nn.Module) -> float:
    """Return what ``fully_shard`` divides the sum of the processes' gradients by.

    It is the number of processes, unless set_gradient_divide_factor changed it.

    Raises:
        ValueError: the modules have different divisors, or gradient synchronization is off.
    """
    groups: list[Any] = []
    for module in fully_sharded(model):
        state = module._get_fsdp_state()  # torch has no public function for this
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
