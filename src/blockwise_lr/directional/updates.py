"""The optimizer's own update: the change that it subtracts from each parameter per unit of learning rate."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockwise_lr.blocks import Block
from blockwise_lr.directional.parameter_chunks import Chunk
from blockwise_lr.directional.state_updates import StateUpdates, wide
from blockwise_lr.distributed import local
from blockwise_lr.optimizers.adam_mini import AdamMini

READABLE = (torch.optim.Adam, torch.optim.AdamW, AdamMini)
"""Optimizers whose last update can be read from their state, without their subclasses, which may
step differently."""


class Updates(Protocol):
    """The updates of all parameters of a model, chunk by chunk.

    Attributes:
        kinds: parameters of different kinds must not share a chunk.
    """

    kinds: Sequence[Hashable]

    def of(self, chunk: Chunk) -> Tensor:
        """Return the update of a chunk, in at least float32: (number of parameters, *shape of a slice)."""


class StoredUpdates:
    """Updates that are kept as tensors.

    Args:
        tensors: the update of each parameter.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.kinds: Sequence[Hashable] = [None] * len(tensors)
        self._tensors = tensors

    def of(self, chunk: Chunk) -> Tensor:
        """Return the update of a chunk."""
        return chunk.stack(self._tensors)


def unit_updates(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
    """Return the last update of every parameter as one tensor, as :class:`StateUpdates` computes it.

    Returns:
        One tensor of the shape of each parameter (for a sharded parameter, of its shard on this process). None for
        optimizers that are not READABLE; :func:`stepped_updates` works for them.

    Raises:
        ValueError: a parameter does not belong to the optimizer, or has no state yet.
    """
    updates = state_updates(optimizer, parameters)
    return None if updates is None else whole_updates(updates, len(parameters))


def state_updates(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> StateUpdates | None:
    """Return the updates that the state of an optimizer holds; None if the optimizer is not READABLE.

    Raises:
        ValueError: a parameter does not belong to the optimizer, or has no state yet.
    """
    groups = groups_by_parameter(optimizer, parameters)
    return StateUpdates(optimizer, parameters, groups) if type(optimizer) in READABLE else None


def whole_updates(updates: Updates, count: int) -> list[Tensor]:
    """Return the updates of `count` parameters as one tensor each."""
    return [updates.of(Chunk(Block.OTHER, (i,)))[0] for i in range(count)]


def stepped_updates(
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor | None],
    before: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    r"""Return the update of any optimizer, from the change of the parameters in one step that is then undone.

        u = (theta_before - theta_after) / lr                               with weight decay 0

    Parameters, gradients, optimizer state and groups are restored exactly, to the bit.

    Args:
        optimizer: any torch optimizer whose step is linear in ``lr``.
        parameters: parameters of the model.
        gradients: gradients for the step, from batches that are not used to measure the signal.
        before: a copy of this process's shards of the parameters, if there is one. Default: a copy is made.

    Raises:
        ValueError: a parameter does not belong to the optimizer, or its learning rate is 0.
    """
    groups = groups_by_parameter(optimizer, parameters)
    for group in groups:
        if not float(group["lr"]) > 0:
            raise ValueError(
                f"a group of {type(optimizer).__name__} has learning rate {float(group['lr']):g}, so a step shows no "
                "update: measure after the first warm-up step and before the schedule has ended"
            )
    if before is None:
        before = [local(parameter.detach()).clone() for parameter in parameters]
    updates = []
    with _restored_afterwards(optimizer, parameters, before), torch.no_grad():
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        gradient = None
        del gradients  # so that a gradient is freed before the update of its parameter is made
        optimizer.step()
        for start, parameter, group in zip(before, parameters, groups):
            parameter.grad = None
            updates.append((wide(start) - wide(local(parameter.detach()))).div_(float(group["lr"])))
    return updates


def groups_by_parameter(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Return the group of each parameter in the optimizer.

    Raises:
        ValueError: a parameter does not belong to the optimizer.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    missing = [i for i, parameter in enumerate(parameters) if id(parameter) not in group_of]
    if missing:
        shapes = ", ".join(str(tuple(parameters[i].shape)) for i in missing[:3])
        raise ValueError(
            f"{len(missing)} of the model's {len(parameters)} trainable parameters are not in the optimizer (shapes "
            f"{shapes} ...); expected all of them: pass the optimizer that trains this model"
        )
    return [group_of[id(parameter)] for parameter in parameters]


@contextmanager
def _restored_afterwards(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], before: Sequence[Tensor]
) -> Iterator[None]:
    """Set weight decay to 0 and widen the state to float32; on exit, restore everything."""
    state = dict(optimizer.state)
    # The parameters have been converted to float32, and the state must match.
    for parameter, value in state.items():
        optimizer.state[parameter] = _widened(copy.deepcopy(value))
    # Save all keys of a group, because optimizers of pytorch_optimizer count their steps there.
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    gradients = [parameter.grad for parameter in parameters]
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in zip(parameters, before, gradients):
                local(parameter).copy_(value)
                parameter.grad = gradient
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, setting in zip(optimizer.param_groups, settings):
            members = group["params"]
            group.clear()
            group.update(params=members, **setting)


def _widened(value: Any) -> Any:
    """Return the state of an optimizer with its half-precision tensors converted to float32."""
    if isinstance(value, Tensor):
        return wide(value)
    if isinstance(value, dict):
        return {key: _widened(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_widened(each) for each in value]
    return value
