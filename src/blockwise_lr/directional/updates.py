"""The optimizer's own update: what it would subtract from each parameter per unit of learning rate."""

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
"""Whose last update is read from the state. Not their subclasses, which may step otherwise."""


def unit_updates(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
    r"""The last update of an Adam-like optimizer, read from its state, per unit of learning rate.

        u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)         theta <- theta - lr (u + decay theta)

    Weight decay is left out where it is decoupled (AdamW). Nothing is computed or changed.

    Args:
        optimizer: torch.optim's Adam or AdamW, or AdamMini (subclasses may step otherwise, so they are not read).
        parameters: the model's; each must be the optimizer's and have been stepped.

    Returns:
        One tensor of each parameter's shape (of a sharded one, this process's shard), in float32 at least; None for
        another kind of optimizer, whose update is seen only in a step (:func:`stepped_updates`).

    Raises:
        ValueError: a parameter is not the optimizer's, or has no state yet.
    """
    groups = groups_of(optimizer, parameters)
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
    r"""The update of any optimizer, from the change of the parameters over one step that is then undone.

        u = (theta_before - theta_after) / lr                               with weight decay 0

    Parameters, gradients, the optimizer's state and its groups are put back to the bit.

    Args:
        optimizer: any torch optimizer whose step is linear in ``lr``.
        parameters: the model's.
        gradients: what the step is given; of batches that the signal is not measured on.

    Raises:
        ValueError: a parameter is not the optimizer's, or its learning rate is 0 now.
    """
    groups = groups_of(optimizer, parameters)
    for group in groups:
        if not float(group["lr"]) > 0:
            raise ValueError(
                f"a group of {type(optimizer).__name__} has learning rate {float(group['lr']):g}, so a step shows no "
                "update: measure after the first warm-up step and before the schedule has ended"
            )
    before = [local(parameter.detach()).clone() for parameter in parameters]
    with _undone(optimizer, parameters, before), torch.no_grad():
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        optimizer.step()
        return [
            (_wide(start) - _wide(local(parameter.detach()))) / float(group["lr"])
            for start, parameter, group in zip(before, parameters, groups)
        ]


@contextmanager
def taken_back(
    parameters: Sequence[nn.Parameter], updates: Sequence[Tensor], groups: Sequence[dict[str, Any]]
) -> Iterator[None]:
    r"""The parameters where the last update was taken, and afterwards as they were, to the bit.

        (theta + lr u) / (1 - lr decay)                                        the decay where it is decoupled

    The state of an optimizer holds an update that has been applied. From where it led to, it says what is left to gain
    by more of it, and a block at the lowest loss along its update would seem to need no learning rate at all. Holds a
    second copy of the parameters meanwhile.

    Args:
        parameters: the model's.
        updates: of each, from :func:`unit_updates`.
        groups: of each, from :func:`groups_of`; their ``lr`` stands for that of the last step.
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


def groups_of(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """The optimizer's group of each parameter. Raises ValueError for one that is in none."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    missing = [i for i, parameter in enumerate(parameters) if id(parameter) not in group_of]
    if missing:
        shapes = ", ".join(str(tuple(parameters[i].shape)) for i in missing[:3])
        raise ValueError(
            f"{len(missing)} of the model's {len(parameters)} trainable parameters are not in the optimizer (shapes "
            f"{shapes} ...): is it this model's optimizer?"
        )
    return [group_of[id(parameter)] for parameter in parameters]


@contextmanager
def _undone(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], before: Sequence[Tensor]
) -> Iterator[None]:
    state = dict(optimizer.state)
    for parameter, value in state.items():  # parameters are float32 at least by now, and the state must match
        optimizer.state[parameter] = _widened(copy.deepcopy(value))
    # All of a group: pytorch_optimizer's count their steps there.
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
    """An optimizer's state with half-precision tensors in float32."""
    if isinstance(value, Tensor):
        return _wide(value)
    if isinstance(value, dict):
        return {key: _widened(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_widened(each) for each in value]
    return value


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
