"""The cosine between the gradient of each block and its last update, in few kernels and one host sync."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from blockwise_lr.blocks import Block
from blockwise_lr.directional.parameter_chunks import chunk_elements, chunks
from blockwise_lr.directional.state_updates import StateUpdates
from blockwise_lr.distributed import is_sharded, is_split, local, sharded_like


def agreement(groups: Mapping[Block, Sequence[dict[str, Any]]], optimizer: Optimizer) -> dict[Block, float]:
    """Return cos(g_b, u_b), the cosine between the gradient of each block and its last update.

    Blocks without gradient or without update are left out. The number of kernels does not grow with the number of
    layers, and the host waits for the device once.

    Args:
        groups: the groups of each block.
        optimizer: their optimizer: Adam, AdamW or AdamMini.
    """
    members = [
        (parameter, group, block)
        for block, groups_of_block in groups.items()
        for group in groups_of_block
        for parameter in group["params"]
        if parameter.grad is not None and optimizer.state.get(parameter)
    ]
    if not members:
        return {}
    sums = _sums(members, optimizer, {block: row for row, block in enumerate(groups)})
    return {
        block: dot / math.sqrt(gg * uu)
        for block, (dot, gg, uu) in zip(groups, sums.tolist())
        if gg > 0 and uu > 0 and math.isfinite(dot)
    }


def _sums(
    members: Sequence[tuple[torch.nn.Parameter, dict[str, Any], Block]],
    optimizer: Optimizer,
    rows: Mapping[Block, int],
) -> Tensor:
    """Return <g, u>, <g, g> and <u, u> of each block over all shards: (blocks, 3) float64."""
    parameters = [parameter for parameter, _, _ in members]
    updates = StateUpdates(optimizer, parameters, [group for _, group, _ in members])
    gradients = [local(sharded_like(p, p.grad)) for p in parameters if p.grad is not None]
    sharded = any(map(is_sharded, parameters))
    # Every process has a parameter that is not split, and the sums are over processes.
    shares = [
        1 / dist.get_world_size() if sharded and not is_split(parameter) else 1.0 for parameter in parameters
    ]
    total = torch.zeros(len(rows), 3, dtype=torch.float64, device=gradients[0].device)
    for chunk in chunks(
        [[(block, None)] for _, _, block in members],
        gradients,
        list(zip(updates.kinds, shares)),
        chunk_elements(gradients),
    ):
        update = updates.of(chunk)
        gradient = chunk.stack(gradients).to(update.dtype)
        products = ((gradient, update), (gradient, gradient), (update, update))
        found = torch.stack([(a * b).sum() for a, b in products])
        total[rows[chunk.block]].add_(_on_device(found, total.device), alpha=shares[chunk.indices[0]])
    if sharded:
        dist.all_reduce(total)
    return total


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device)
