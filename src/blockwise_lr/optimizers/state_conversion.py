"""Convert the state of a parameter from one optimizer to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blockwise_lr.fp32 import HALF
from blockwise_lr.optimizers.adam_mini_views import spread
from blockwise_lr.optimizers.state_template import StateTemplate

State = dict[str, Any]

# Optimizers initialise these to 0, which is therefore their value if the old state lacks them.
_BEGIN_AT_ZERO = ("max_exp_avg_sq", "exp_avg_slow")
# Optimizers create these on demand, so they may be missing.
_OPTIONAL = ("hessian",)
# Averages of squared gradients, which may be averaged over more elements or repeated over the elements they cover.
_AVERAGED = ("exp_avg_sq", "max_exp_avg_sq", "row_var", "col_var")
_MU_DECAY = 0.96  # constant of NAdam, Dozat 2016


def moment_meanings(state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, str]:
    """Return the meaning of each entry of a state.

    The meaning is the name of the entry, unless two optimizers use this name for different quantities.

    Args:
        state: the state of one parameter in any optimizer.
        group: the group of the parameter, whose hyperparameters identify the optimizer.

    Example:
        >>> moment_meanings({"momentum_buffer": 0}, {"ns_steps": 5})
        {'momentum_buffer': 'exp_avg'}
        >>> moment_meanings({"momentum_buffer": 0}, {"nesterov": True})
        {'momentum_buffer': 'momentum_buffer'}
    """
    found = {key: key for key in state}
    if "momentum_buffer" in found and "ns_steps" in group:  # Muon's buffer is an average, SGD's buffer a sum
        found["momentum_buffer"] = "exp_avg"
    for key, name in (("GG", "exp_avg_sq in SOAP's basis"), ("exp_avg_diff", "exp_avg_sq of Adan")):
        if key in state and "exp_avg_sq" in state:
            found["exp_avg_sq"] = name
    return found


def convert_state(
    state: Mapping[str, Any],
    count: int | None,
    old_group: Mapping[str, Any],
    template: StateTemplate,
    group: Mapping[str, Any],
    parameter: Tensor,
    second: torch.Size,
) -> State | list[str]:
    """Return the state of a parameter in the form of the new optimizer, or the names of the values that are missing.

    Args:
        state: the old state, in the layout of the parameter.
        count: number of steps in the old state; None if the old optimizer does not count.
        old_group, group: the group of the parameter in the old and in the new optimizer.
        template: the form of the new state.
        parameter: the parameter; not a DTensor.
        second: shape of ``exp_avg_sq`` in the new optimizer.

    Raises:
        ValueError: the shape of a moment does not fit the parameter. The message begins with the name of the moment.
    """
    old = {meaning: key for key, meaning in moment_meanings(state, old_group).items()}
    new: State = {}
    missing = []
    for key, meaning in moment_meanings(template.values, group).items():
        example = template.values[key]
        shape = second if meaning in ("exp_avg_sq", "max_exp_avg_sq") else template.shapes[key]
        if meaning == "step":
            if count is None:
                missing.append(key)
            else:
                new[key] = _scalar(count, example)
        elif meaning in old:
            new[key] = _fit_moment(old[meaning], state[old[meaning]], example, shape, parameter)
        elif meaning in _BEGIN_AT_ZERO:
            new[key] = torch.zeros_like(_empty_like(parameter, example, shape or parameter.shape))
        elif meaning == "mu_product" and count is not None:
            new[key] = _scalar(_mu_product(count, group), example)
        elif meaning not in _OPTIONAL:
            missing.append(key)
    return missing or new


def copy_state(state: Mapping[str, Any], group: Mapping[str, Any], parameter: Tensor) -> State:
    """Return a copy of the old state in the dtype of the parameter, by torch's rules for ``load_state_dict``.

    Use this for an optimizer whose trial step failed.
    """
    on_device = bool(group.get("fused") or group.get("capturable"))
    new: State = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim == 0:
            device = parameter.device if on_device else torch.device("cpu")
            new[key] = value.to(device, torch.float32 if on_device else value.dtype, copy=True)
        else:
            new[key] = _fit_moment(key, value, parameter, None, parameter)
    return new


def _fit_moment(key: str, value: Any, template: Any, shape: torch.Size | None, parameter: Tensor) -> Any:
    """Return a moment in the shape, dtype and device of the new optimizer.

    A second moment is averaged over elements or repeated over them, as its shape requires.
    """
    if isinstance(value, (list, tuple)):  # the matrices of SOAP, one per dimension
        templates = template if isinstance(template, (list, tuple)) else [template]
        like = next((each for each in templates if isinstance(each, Tensor)), parameter)
        return type(value)(_fit_moment(key, each, like, None, parameter) for each in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0:
        return _scalar(value, template)
    if shape is not None and value.shape != shape:
        fits = value.ndim == len(shape) and all(
            max(a, b) % min(a, b) == 0 if a and b else a == b for a, b in zip(value.shape, shape)
        )
        if not fits or key not in _AVERAGED:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, and its parameter {tuple(parameter.shape)}; expected equal "
                "shapes: load the state that was saved with this model"
            )
        wide = value.float() if value.dtype in HALF else value
        value = _average_pieces(spread(wide, parameter.shape), shape)
    target = template if isinstance(template, Tensor) else parameter
    return _empty_like(parameter, target, value.shape).copy_(value.detach())


def _empty_like(parameter: Tensor, template: Tensor, shape: torch.Size) -> Tensor:
    """Return an empty tensor with the dtype and device of the template.

    If the shape is that of the parameter, the memory format is that of the parameter, too.
    """
    kind: dict[str, Any] = {"dtype": template.dtype, "device": template.device}
    if shape == parameter.shape:
        return torch.empty_like(parameter, requires_grad=False, memory_format=torch.preserve_format, **kind)
    return torch.empty(shape, **kind)


def _scalar(value: Any, template: Any) -> Any:
    """Return a number in the form of the template: a tensor of its dtype on its device, or a plain number."""
    if isinstance(template, Tensor):
        return torch.full(template.shape, float(value), dtype=template.dtype, device=template.device)
    if isinstance(template, (int, float)):
        return type(template)(value)
    return value.clone() if isinstance(value, Tensor) else value


def _mu_product(count: int, group: Mapping[str, Any]) -> float:
    """Return NAdam's product of all its momenta after `count` steps."""
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    momenta = group["betas"][0] * (1 - 0.5 * _MU_DECAY ** (steps * group["momentum_decay"]))
    return float(momenta.prod())


def _average_pieces(value: Tensor, pieces: Sequence[int]) -> Tensor:
    """Return the mean over each piece."""
    for dim, count in enumerate(pieces):
        if value.shape[dim] != count:
            value = torch.unflatten(value, dim, (count, -1)).mean(dim + 1)
    return value
