"""Set the base learning rate of all parameter groups, for training loops that assign it themselves."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor


def set_lr(optimizer: Any, lr: float | Tensor) -> None:
    """Set every group's learning rate to ``lr`` times the ratio of its block.

    Write it wherever a loop would assign one learning rate to all groups::

        for group in optimizer.param_groups:        # erases the ratios
            group["lr"] = lr

        set_lr(optimizer, lr)                       # keeps them

    Groups that already hold their learning rate as a tensor are filled in place, so a compiled or captured step sees
    the change. Groups with ``decay="constant"`` keep the weight decay that they had at the peak: a step then shrinks
    their weights by ``lr`` times the weight decay that :func:`blockwise_lr.param_groups` was given.

    Args:
        optimizer: a torch optimizer on the groups of :func:`blockwise_lr.param_groups`, or a wrapper that has it as
            ``optimizer`` (accelerate, Lightning, DeepSpeed). Groups without ``lr_ratio`` count as ratio 1.
        lr: the base learning rate, that of a block whose ratio is 1. A number, or a tensor of one element.

    Raises:
        ValueError: lr is negative, not finite or no number; optimizer has no parameter groups.

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
    """The learning-rate ratio of a group; 1 for groups that were not made by ``param_groups``."""
    return float(group.get("lr_ratio", 1.0))


def write_lr(group: dict[str, Any], value: float | Tensor) -> None:
    """Set ``group["lr"]``; a tensor keeps its identity, since a compiled or captured step holds on to it."""
    held = group["lr"]
    if isinstance(held, Tensor):
        if isinstance(value, Tensor):
            held.copy_(value.reshape(held.shape))
        else:
            held.fill_(value)
    else:
        group["lr"] = float(value)


def restore_peak_decay(group: dict[str, Any]) -> None:
    """Undo a schedule's adjustment of the weight decay: with rates in proportion the peak's decay is right."""
    if group.get("decay") == "constant" and "peak_weight_decay" in group:
        group["weight_decay"] = group["peak_weight_decay"]


def all_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer and of every optimizer that it wraps, each dictionary once.

    A wrapper may hold copies of the dictionaries that became stale after ``load_state_dict``, hence all of them.
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
        # Reading it would wait for the device.
        return lr.detach() if lr.device.type != "cpu" else _checked_lr(lr.item())
    if isinstance(lr, bool) or not isinstance(lr, Real) or not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr is {lr!r}; expected a finite number of at least 0: set_lr(optimizer, 3e-4)")
    return float(lr)
