"""The learning rates that a torch scheduler stores, and whether they already differ between blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

# Attributes of a scheduler that hold one learning rate per group, in addition to base_lrs.
_RATE_LISTS = ("max_lrs", "min_lrs", "_init_lrs")
# Keys under which a scheduler stores learning rates in the groups.
_GROUP_RATES = {OneCycleLR: ("initial_lr", "max_lr", "min_lr")}
_ROUNDING = 1e-6


def overwrites(leaf: Any, groups: Sequence[Mapping[str, Any]], ratios: Sequence[float]) -> bool:
    """Return whether the scheduler started from its own rate, not from the ``initial_lr`` of each group."""
    base = getattr(leaf, "base_lrs", None)
    if not base or not all_equal(base):
        return False
    if ratios_differ(ratios) or isinstance(leaf, (CyclicLR, OneCycleLR)):
        return True
    return not all(same_lr(lr, group.get("initial_lr", lr)) for lr, group in zip(base, groups))


def divide_stored_rates(
    leaf: Any, groups: Sequence[dict[str, Any]], ratios: Sequence[float], overwritten: bool
) -> None:
    """Divide the learning rates that the scheduler stores by the ratios.

    Rates that are equal for all groups are already base learning rates and are not changed.
    """
    if getattr(leaf, "base_lrs", None) and not overwritten:
        leaf.base_lrs = [lr / ratio for lr, ratio in zip(leaf.base_lrs, ratios)]
    for name in _RATE_LISTS:
        values = getattr(leaf, name, None)
        if values and not (all_equal(values) and (ratios_differ(ratios) or name != "_init_lrs")):
            setattr(leaf, name, [lr / ratio for lr, ratio in zip(values, ratios)])
    keys = next((keys for kind, keys in _GROUP_RATES.items() if isinstance(leaf, kind)), ())
    for key in (*keys, "swa_lr"):
        values = [group.get(key) for group in groups]
        if None not in values and not all_equal(values):
            for group, ratio in zip(groups, ratios):
                group[key] = group[key] / ratio


def refuse_moved(
    scheduler: Any, leaves: Sequence[Any], groups: Sequence[Mapping[str, Any]], rates: Sequence[Any]
) -> None:
    """Raise ValueError if the scheduler has changed the groups by different factors.

    The ratios and the schedule can then no longer be separated.
    """
    base = getattr(leaves[0], "base_lrs", None) or ()
    shares = [(float(rate) / float(lr), group) for rate, lr, group in zip(rates, base, groups) if lr > 0]
    if not shares:
        return
    low, one = min(shares, key=lambda pair: pair[0])
    high, other = max(shares, key=lambda pair: pair[0])
    if high - low > _ROUNDING * high:
        raise ValueError(
            f"this {type(scheduler).__name__} has moved the blocks apart already ({one.get('block', 'a group')} is at "
            f"{low:.3g} of its first rate, {other.get('block', 'a group')} at {high:.3g}): wrap it when it is made, "
            "scheduler = scale_by_block(scheduler), and load_state_dict afterwards"
        )


def lr_of(group: Mapping[str, Any]) -> Any:
    """Return the learning rate of a group; of a tensor, a copy."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        return lr.detach().clone()
    return float(lr)


def same_lr(one: Any, other: Any) -> bool:
    """Return whether two learning rates are equal.

    Tensors on a device count as equal, because comparing them would cause a host sync.
    """
    if any(isinstance(each, Tensor) and each.device.type != "cpu" for each in (one, other)):
        return True
    return float(one) == float(other)


def all_equal(values: Sequence[Any]) -> bool:
    """Return whether all learning rates are equal."""
    return len({float(value) for value in values}) == 1


def ratios_differ(ratios: Sequence[float]) -> bool:
    """Return whether at least two ratios differ."""
    return len(set(ratios)) > 1
