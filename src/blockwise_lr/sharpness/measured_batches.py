"""Batches of a measurement: in groups that count as one, and as many on every process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch.distributed as dist

from blockwise_lr import distributed as processes
from blockwise_lr.sharpness.parameter_parts import ParameterParts


def accumulated(
    batches: Iterable[Any] | Mapping[str, Any] | None, accumulate: int, limit: int | None
) -> Iterator[list[Any]]:
    """Yield groups of `accumulate` batches, at most `limit` of them."""
    each = iter([batches] if isinstance(batches, Mapping) else batches or [])
    taken = 0
    while limit is None or taken < limit:
        group = list(islice(each, accumulate))
        if not group:
            return
        if len(group) < accumulate:
            if taken == 0:
                raise ValueError(f"accumulate is {accumulate}, but there are only {len(group)} batches")
            return  # with estimator="empirical", the expected value depends on the batch size
        taken += 1
        yield group


def in_lockstep(batches: Iterator[list[Any]], parts: ParameterParts) -> Iterator[list[Any]]:
    """Yield the batches; before each, check that every process has one.

    If the processes have different numbers of batches, all of them raise an error, and none waits for another.

    Args:
        batches: this process's batches.
        parts: the parts of the model's parameters.
    """
    if not (parts.distributed or parts.tensor_parallel):
        yield from batches
        return
    device, done, world = parts.parameters[0].device, 0, dist.get_world_size()
    while True:
        batch, failed = None, None
        try:
            batch = next(batches, None)
        except Exception as error:  # an error of the data loader: report it to the other processes first
            failed = error
        # A process that failed adds more than all others can together.
        found = processes.sum_over_ranks(int(batch is not None) + (world + 1 if failed else 0), device)
        if failed is not None:
            raise failed
        if found > world:
            raise ValueError(f"another process could not make batch {done + 1}: its error is printed there")
        if 0 < found < world:
            raise ValueError(
                f"only {found} of {world} processes have more than {done} batches; expected as many "
                "on each: set max_batches"
            )
        if batch is None:
            return
        if parts.tensor_parallel:
            processes.check_same_batch(batch, device)
        done += 1
        yield batch
