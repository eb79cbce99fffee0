"""Sum the gradients of replicated parameters over processes, many parameters in one exchange."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from blockwise_lr.distributed import is_sharded
from blockwise_lr.sharpness.tensor_sums import accumulation_dtype

_EXCHANGED = 1 << 24  # elements of one exchange, unless a single parameter has more


def summed_in_groups(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Iterator[tuple[Sequence[int], Sequence[Tensor | None]]]:
    """Yield indices and gradients in groups, summed over processes where the parameter is not sharded. Collective.

    Args:
        parameters: the parameters, the same on all processes.
        gradients: one for each parameter. Gradients of sharded parameters are passed on: they are sums already.

    Yields:
        The indices of some parameters, and their gradients. Half-precision gradients are summed in float32.
    """
    sharded = [i for i, parameter in enumerate(parameters) if is_sharded(parameter)]
    yield sharded, [gradients[i] for i in sharded]
    for indices in _groups(parameters):
        first, sizes = parameters[indices[0]], [parameters[i].numel() for i in indices]
        # A parameter without gradient here (an expert that saw no token) may have one elsewhere.
        flat = torch.zeros(sum(sizes), dtype=accumulation_dtype(first), device=first.device)
        pieces = [piece.view(parameters[i].shape) for i, piece in zip(indices, torch.split(flat, sizes))]
        pairs = [(piece, found) for i, piece in zip(indices, pieces) if (found := gradients[i]) is not None]
        if pairs:
            torch._foreach_copy_([piece for piece, _ in pairs], [found.detach() for _, found in pairs])
        dist.all_reduce(flat)
        yield indices, pieces


def _groups(parameters: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of unsharded parameters in groups of one dtype and device, and of limited size."""
    groups: list[list[int]] = []
    kind, size = None, 0
    for i, parameter in enumerate(parameters):
        if is_sharded(parameter):
            continue
        found = (parameter.dtype, parameter.device)
        if found != kind or size + parameter.numel() > _EXCHANGED:
            groups.append([])
            kind, size = found, 0
        groups[-1].append(i)
        size += parameter.numel()
    return groups
