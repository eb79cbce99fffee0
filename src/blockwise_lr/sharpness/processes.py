"""Several processes: counts over all of them, each one's share of the random numbers, and fully_shard's habits."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockwise_lr.blocks.block import Piece


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


def check_sharding(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Only data parallelism is understood: gradients are sums over all processes.

    Raises:
        ValueError: the parameter is sharded, but not by ``fully_shard`` over all processes.
    """
    placements, mesh = parameter.placements, parameter.device_mesh  # type: ignore[attr-defined]
    # One dimension, or HSDP's two: replicas of shards.
    known = all(placement.is_replicate() for placement in placements[:-1]) and placements[-1].is_shard()
    if not (fully_sharded(model) and known and mesh.size() == dist.get_world_size()):
        raise ValueError(
            f"{name} is sharded as {', '.join(map(str, placements))} over {mesh.size()} of "
            f"{dist.get_world_size()} processes; expected fully_shard over all of them (tensor, pipeline and expert "
            "parallelism are not supported)"
        )


def own_elements(parameter: Tensor, shard: Tensor, piece: Piece | None) -> Tensor:
    """What this process's shard holds of a part of the parameter; nothing if another process has the same shard.

    Args:
        parameter: sharded as :func:`check_sharding` wants it.
        shard: this process's, of the parameter or of anything sharded like it.
        piece: where the part lies in the whole parameter, or None for all of it.
    """
    mesh, placement = parameter.device_mesh, parameter.placements[-1]  # type: ignore[attr-defined]
    last = mesh.ndim - 1
    if any(mesh.get_local_rank(dimension) for dimension in range(last)):  # HSDP: a replica
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
