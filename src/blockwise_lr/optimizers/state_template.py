"""Learn the form of an optimizer's state for a parameter from one trial step on a small clone."""

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

_LONGEST = 64  # largest side of a clone with one or two dimensions
_LONGEST_OF_MANY = 8  # largest side of a clone with three or more dimensions


@dataclass(frozen=True)
class StateTemplate:
    """The state that an optimizer has for one parameter after its first step.

    Args:
        values: the state of the clone, by name. Dtypes and devices are those of the parameter's own state.
        shapes: the shape of each tensor for the whole parameter; None for scalars, and where the size of the clone does
            not determine it.
        counter: whether the number of steps is stored in the group and not in the state (as in pytorch_optimizer).
    """

    values: dict[str, Any]
    shapes: dict[str, torch.Size | None]
    counter: bool


def learn_state_template(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, trials: dict[Any, Any] | None = None
) -> StateTemplate | None:
    """Return the state that `optimizer` would have for `parameter`, without a step of `optimizer` itself.

    A copy of the optimizer, without hooks and state, steps a clone of the parameter whose sides are at most 64 long.
    The optimizer's own code therefore creates the state: in float32 for AdamMini, and on the parameter's device for
    fused and capturable optimizers. The random number generators are restored.

    Args:
        optimizer: the optimizer, without wrapper. It is not changed.
        group: the group of the parameter in this optimizer.
        parameter: the parameter; not a DTensor.
        trials: cache of results, so that parameters of one kind need only one trial step.

    Returns:
        The template; None if the optimizer raised an error in the trial step before it created any state.
    """
    longest = _LONGEST if parameter.ndim < 3 else _LONGEST_OF_MANY
    small = tuple(min(size, longest) for size in parameter.shape)
    key = (id(group), small, parameter.dtype, parameter.device)
    trials = {} if trials is None else trials
    if key not in trials:
        trials[key] = _take_trial_step(optimizer, group, small, parameter)
    found = trials[key]
    if found is None:
        return None
    values, counter = found
    shapes = {name: _shape(value, small, parameter.shape) for name, value in values.items()}
    return StateTemplate(values, shapes, counter)


def _take_trial_step(
    optimizer: Optimizer, group: Mapping[str, Any], small: tuple[int, ...], parameter: Tensor
) -> tuple[dict[str, Any], bool] | None:
    """Step a clone of shape `small`, on the parameter's device or, if that fails, on the CPU.

    Returns:
        The state of the clone, and whether the group counts steps; None if both devices failed.
    """
    for device in dict.fromkeys((parameter.device, torch.device("cpu"))):
        clone = torch.ones(small, dtype=parameter.dtype, device=device, requires_grad=True)
        values, counter, failed = _step(optimizer, group, clone)
        if values or not failed:
            if device != parameter.device:  # the trial step on the parameter's device failed
                on_device = bool(group.get("fused") or group.get("capturable"))
                values = {key: _moved(value, parameter, on_device) for key, value in values.items()}
            return values, counter
    return None


def _step(optimizer: Optimizer, group: Mapping[str, Any], clone: Tensor) -> tuple[dict[str, Any], bool, bool]:
    """Step a clone; return its state, whether its group counts steps, and whether the step raised an error."""
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
            # The gradient has a graph, because second-order optimizers differentiate it.
            clone.grad = 2 * clone
        failed = False
        try:
            with torch.no_grad():
                inspect.unwrap(type(optimizer).step)(trial)
        except Exception:  # an optimizer can raise any error; its state usually exists by then
            failed = True
    return dict(trial.state[clone]), "step" in trial.param_groups[0], failed


def _shape(value: Any, small: tuple[int, ...], whole: torch.Size) -> torch.Size | None:
    """Return the shape for the whole parameter of a tensor in the state of the clone."""
    if not isinstance(value, Tensor) or value.ndim != len(small) or value.ndim == 0:
        return None
    sides = [
        size if own == clone else own if own == 1 else None
        for own, clone, size in zip(value.shape, small, whole)
    ]
    return None if None in sides else torch.Size(side for side in sides if side is not None)


def _moved(value: Any, parameter: Tensor, on_device: bool) -> Any:
    """Move a value from a trial step on the CPU to the device where the optimizer would create it."""
    if isinstance(value, Tensor):
        return value.to(parameter.device) if value.ndim or on_device else value
    if isinstance(value, list):
        return [_moved(each, parameter, on_device) for each in value]
    return value


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside a wrapper, such as that of accelerate."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def second_moment_shape(optimizer: Optimizer, parameter: Tensor, partition: list[int] | None) -> torch.Size:
    """Return the shape of ``exp_avg_sq``: one element per piece in AdamMini, otherwise that of the parameter."""
    if isinstance(optimizer, AdamMini) and partition is not None:
        return torch.Size(partition)
    return parameter.shape
