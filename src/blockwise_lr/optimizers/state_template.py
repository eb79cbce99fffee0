"""What an optimizer keeps for a parameter, learned from one trial step of a small clone."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blockwise_lr.optimizers.adam_mini import AdamMini

_LONGEST = 64  # longest side of the clone that takes the trial step
_LONGEST_OF_MANY = 8  # the same for a clone of three dimensions or more


@dataclass(frozen=True)
class StateTemplate:
    """What an optimizer keeps for one parameter after its first step.

    Args:
        values: by name, as a first step leaves it. Their dtypes and devices are those of the parameter's own state.
        shapes: shape of each tensor that has dimensions, for the whole parameter; None where the size of the clone
            does not tell it.
        counter: the number of steps is in the group, not in the state (pytorch_optimizer's way).
    """

    values: dict[str, Any]
    shapes: dict[str, torch.Size | None]
    counter: bool


def learn_state_template(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, known: dict[Any, Any] | None = None
) -> StateTemplate | None:
    """Return what `optimizer` would keep for `parameter`, without a step of `optimizer` itself.

    A copy of the optimizer, with no hooks and no state, steps a clone of the parameter whose sides are at most 64. It
    makes its state as its own code does: in float32 for AdamMini, on the parameter's device for fused and capturable
    ones. Random numbers are put back.

    Args:
        optimizer: unwrap_optimizer; not changed.
        group: the parameter's group in it.
        parameter: whole, not a DTensor.
        known: results by kind of parameter, to step one clone of each kind.

    Returns:
        None if the optimizer raised in that step before it made any state.
    """
    longest = _LONGEST if parameter.ndim < 3 else _LONGEST_OF_MANY
    small = tuple(min(size, longest) for size in parameter.shape)
    key = (id(group), small, parameter.dtype, parameter.device)
    known = {} if known is None else known
    if key not in known:
        known[key] = _take_trial_step(optimizer, group, small, parameter)
    found = known[key]
    if found is None:
        return None
    values, counter = found
    shapes = {name: _shape(value, small, parameter.shape) for name, value in values.items()}
    return StateTemplate(values, shapes, counter)


def _take_trial_step(
    optimizer: Optimizer, group: Mapping[str, Any], small: tuple[int, ...], parameter: Tensor
) -> tuple[dict[str, Any], bool] | None:
    for device in dict.fromkeys((parameter.device, torch.device("cpu"))):
        clone = torch.ones(small, dtype=parameter.dtype, device=device, requires_grad=True)
        values, counter, failed = _step(optimizer, group, clone)
        if values or not failed:
            if device != parameter.device:  # its own device could not be tried
                on_device = bool(group.get("fused") or group.get("capturable"))
                values = {key: _moved(value, parameter, on_device) for key, value in values.items()}
            return values, counter
    return None


def _step(optimizer: Optimizer, group: Mapping[str, Any], clone: Tensor) -> tuple[dict[str, Any], bool, bool]:
    """The state of the clone after a step, whether its group counts steps, and whether the step raised."""
    trial: Optimizer = object.__new__(type(optimizer))
    trial.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "step"})
    trial.state = defaultdict(dict)
    for key, value in vars(optimizer).items():
        if isinstance(value, OrderedDict):  # hooks
            setattr(trial, key, OrderedDict())
    settings = {key: copy.copy(value) for key, value in group.items() if key not in ("params", "step")}
    if "partitions" in settings:
        settings["partitions"] = [[1] * clone.ndim]
    settings |= {key: settings[key][:1] for key in ("names", "output_dims") if key in settings}
    if "compile" in settings:
        settings["compile"] = False
    trial.param_groups = [{"params": [clone], **settings}]
    with torch.random.fork_rng([clone.device] if clone.device.type == "cuda" else []):
        with torch.enable_grad():
            clone.grad = 2 * clone  # with a graph: second-order optimizers differentiate it
        failed = False
        try:
            with torch.no_grad():
                inspect.unwrap(type(optimizer).step)(trial)
        except Exception:  # whatever an optimizer raises; the state is made first
            failed = True
    return dict(trial.state[clone]), "step" in trial.param_groups[0], failed


def _shape(value: Any, small: tuple[int, ...], whole: torch.Size) -> torch.Size | None:
    """The shape that a tensor of the clone's state has for the whole parameter."""
    if not isinstance(value, Tensor) or value.ndim != len(small) or value.ndim == 0:
        return None
    sides = [
        size if own == clone else own if own == 1 else None
        for own, clone, size in zip(value.shape, small, whole)
    ]
    return None if None in sides else torch.Size(side for side in sides if side is not None)


def _moved(value: Any, parameter: Tensor, on_device: bool) -> Any:
    """A tensor of a trial on the CPU, where the parameter's own device would have it."""
    if isinstance(value, Tensor):
        return value.to(parameter.device) if value.ndim or on_device else value
    if isinstance(value, list):
        return [_moved(each, parameter, on_device) for each in value]
    return value


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside of accelerate's wrapper and the like."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def second_moment_shape(optimizer: Optimizer, parameter: Tensor, partition: list[int] | None) -> torch.Size:
    """Return the shape of ``exp_avg_sq``: one element for each piece in AdamMini, else the parameter's."""
    if isinstance(optimizer, AdamMini) and partition is not None:
        return torch.Size(partition)
    return parameter.shape
