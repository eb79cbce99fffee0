"""Set the base learning rate of all parameter groups, for training loops that assign learning rates themselves."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor


def set_lr(optimizer: Any, lr: float | Tensor) -> None:
    """Set the learning rate of every group to `lr` times the ratio of its block.

    Use it where a loop would assign one learning rate to all groups::

        for group in optimizer.param_groups:        # erases the ratios
            group["lr"] = lr

        set_lr(optimizer, lr)                       # keeps the ratios

    Learning rates that are tensors are changed in place, so a compiled or captured step uses the new value. Groups with
    ``decay="constant"`` keep the weight decay that they had at the peak. A step then shrinks their weights by `lr`
    times the weight decay that was given to :func:`blockwise_lr.param_groups`.

    Args:
        optimizer: a torch optimizer on the groups of :func:`blockwise_lr.param_groups`, or a wrapper with an attribute
            ``optimizer`` (accelerate, Lightning, DeepSpeed). Groups without ``lr_ratio`` have ratio 1.
        lr: the base learning rate, which is that of a block whose ratio is 1. A number, or a tensor with one element.

    Raises:
        ValueError: `lr` is negative, not finite or not a number; or `optimizer` has no parameter groups.

    Example:
        >>> import torch
        >>> from blockwise_lr import param_groups
        >>> model = torch.nn.ModuleDict({"wte": torch.nn.Embedding(16, 4), "ln_f": torch.nn.LayerNorm(4)})
        >>> optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, ratios={"emb": 10}), lr=1e-3)
        >>> set_lr(optimizer, 2e-4)
        >>> [(group["block"], group["lr"]) for group in optimizer.param_groups]
        [('norm', 0.0002), ('emb', 0.002)]
    """
    rate = _checked_lr(lr)
    for group in all_groups(optimizer):
        write_lr(group, rate * ratio_of(group))
        restore_peak_decay(group)


def ratio_of(group: dict[str, Any]) -> float:
    """Return the learning-rate ratio of a group; 1 if ``param_groups`` did not create the group."""
    return float(group.get("lr_ratio", 1.0))


def init_scale_of(group: dict[str, Any]) -> float:
    """Return the factor that ``relative_to="init"`` contributes to the ratio of a group; 1 without it."""
    return float(group.get("init_scale", 1.0))


def write_lr(group: dict[str, Any], value: float | Tensor) -> None:
    """Set ``group["lr"]`` to `value`.

    A tensor is changed in place, because a compiled or captured step may hold a reference to it.
    """
    held = group["lr"]
    if isinstance(held, Tensor):
        if isinstance(value, Tensor):
            held.copy_(value.reshape(held.shape))
        else:
            held.fill_(value)
    else:
        group["lr"] = float(value)


def restore_peak_decay(group: dict[str, Any]) -> None:
    """Reset the weight decay of a group to its value at the peak, where a schedule has changed it.

    The value at the peak is right whenever all learning rates have the same ratios as at the peak.
    """
    if group.get("decay") == "constant" and "peak_weight_decay" in group:
        group["weight_decay"] = group["peak_weight_decay"]


def all_groups(optimizer: Any) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer and of every optimizer that it wraps, each dictionary once.

    All of them are needed: after ``load_state_dict``, a wrapper may hold outdated copies of the dictionaries.

    Raises:
        ValueError: there are no parameter groups.
    """
    found: dict[int, dict[str, Any]] = {}
    layer, layers = optimizer, 0
    while layer is not None and layers < 10:
        groups = getattr(layer, "param_groups", None)
        for group in groups if isinstance(groups, (list, tuple)) else ():
            found.setdefault(id(group), group)
        inner = getattr(layer, "optimizer", None)
        layer, layers = (None if inner is layer else inner), layers + 1
    if not found:
        what = "a list" if isinstance(optimizer, (list, tuple)) else f"a {type(optimizer).__name__}"
        raise ValueError(
            f"set_lr got {what}; expected an optimizer with param_groups, or a wrapper that has one as `optimizer`: "
            "set_lr(optimizer, lr)"
        )
    return list(found.values())


def _checked_lr(lr: Any) -> float | Tensor:
    if isinstance(lr, Tensor) and lr.numel() == 1:
        # Reading the value of a tensor on a device would cause a host sync.
        return lr.detach() if lr.device.type != "cpu" else _checked_lr(lr.item())
    if isinstance(lr, bool) or not isinstance(lr, Real) or not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr is {lr!r}; expected a finite number of at least 0: set_lr(optimizer, 3e-4)")
    return float(lr)
