"""The optimizer's own update: the change that it subtracts from each parameter per unit of learning rate."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockwise_lr.distributed import local
from blockwise_lr.optimizers.adam_mini import AdamMini
from blockwise_lr.optimizers.adam_mini_sharded import local_second

READABLE = (torch.optim.Adam, torch.optim.AdamW, AdamMini)
"""Optimizers whose last update can be read from their state, without their subclasses, which may
step differently."""


def unit_updates(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
    r"""Return the last update of an Adam-like optimizer per unit of learning rate, read from its state.

        u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)         theta <- theta - lr (u + decay theta)

    Decoupled weight decay (AdamW) is not part of the update. Nothing is changed.

    Args:
        optimizer: torch.optim's Adam or AdamW, or AdamMini. Subclasses may step differently, so they are not read.
        parameters: parameters of the model. Each must belong to the optimizer and must have been stepped.

    Returns:
        One tensor of the shape of each parameter (for a sharded parameter, of its shard on this process), in at least
        float32. None for other optimizers; :func:`stepped_updates` works for them.

    Raises:
        ValueError: a parameter does not belong to the optimizer, or has no state yet.
    """
    groups = groups_by_parameter(optimizer, parameters)
    if type(optimizer) not in READABLE:
        return None
    updates = []
    for number, (parameter, group) in enumerate(zip(parameters, groups)):
        state = optimizer.state.get(parameter, {})
        if "exp_avg" not in state:
            raise ValueError(
                f"{type(optimizer).__name__} has no state for the model's parameter number {number} of shape "
                f"{tuple(parameter.shape)}: its update is known after a step only; train first"
            )
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        second = local(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"])
        if isinstance(optimizer, AdamMini):
            place = next(i for i, each in enumerate(group["params"]) if each is parameter)
            second = local_second(state["exp_avg_sq"], parameter, group["partitions"][place])
        first = _wide(local(state["exp_avg"])) / (1 - beta1**step)
        updates.append(first / ((_wide(second) / (1 - beta2**step)).sqrt() + group["eps"]))
    return updates


def stepped_updates(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
) -> list[Tensor]:
    r"""Return the update of any optimizer, from the change of the parameters in one step that is then undone.

        u = (theta_before - theta_after) / lr                               with weight decay 0

    Parameters, gradients, optimizer state and groups are restored exactly, to the bit.

    Args:
        optimizer: any torch optimizer whose step is linear in ``lr``.
        parameters: parameters of the model.
        gradients: gradients for the step, from batches that are not used to measure the signal.

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
    before = [local(parameter.detach()).clone() for parameter in parameters]
    with _restored_afterwards(optimizer, parameters, before), torch.no_grad():
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        optimizer.step()
        return [
            (_wide(start) - _wide(local(parameter.detach()))) / float(group["lr"])
            for start, parameter, group in zip(before, parameters, groups)
        ]


@contextmanager
def before_last_update(
    parameters: Sequence[nn.Parameter], updates: Sequence[Tensor], groups: Sequence[dict[str, Any]]
) -> Iterator[None]:
    r"""Move the parameters back to where they were before the last update; restore them exactly on exit.

        (theta + lr u) / (1 - lr decay)                                  with the decay only if it is decoupled

    The state of an optimizer holds an update that has already been applied. Measured after that update, a slope shows
    only the gain of a further update of the same kind. A block that has just reached the minimum along its update would
    then seem to need no learning rate. The context holds a second copy of the parameters.

    Args:
        parameters: parameters of the model.
        updates: the update of each parameter, from :func:`unit_updates`.
        groups: the group of each parameter, from :func:`groups_by_parameter`. Their ``lr`` is taken as that of the last
            step.
    """
    kept = [local(parameter.detach()).clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, update, group in zip(parameters, updates, groups):
                lr = float(group["lr"])
                decay = float(group["weight_decay"]) if group.get("decoupled_weight_decay", True) else 0.0
                local(parameter.detach()).add_(update, alpha=lr).div_(1 - lr * decay)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept):
                local(parameter.detach()).copy_(value)


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
        return _wide(value)
    if isinstance(value, dict):
        return {key: _widened(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_widened(each) for each in value]
    return value


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
