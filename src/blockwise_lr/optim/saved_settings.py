"""Compare the settings of saved parameter groups with those of an optimizer's groups, and merge the two.

The settings of a group are its learning rate, ratio and weight decay, and the hyperparameters of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from blockwise_lr.optim.ratios import NAMED_RATIOS

Group = Mapping[str, Any]

MOVING = "auto_"  # prefix of the keys under which a rule that moves ratios keeps its state in the groups
MOVES = f"{MOVING}moves"  # the key that such a rule sets in every group
_SCALE_KEYS = ("init_scale", "init_rms")
# What a group holds, as opposed to its settings. Saved values can be outdated: other rules, other wrappers.
_CONTENT_KEYS = ("block", "names", "name")
_OUR_KEYS = ("initial_lr", "lr_ratio", "decay", *_SCALE_KEYS, MOVES)
_DECAY_KEYS = ("decay", "weight_decay", "peak_weight_decay")
_RATE_KEYS = ("lr", "initial_lr", "lr_ratio", *_SCALE_KEYS)
# OneCycleLR keeps its rates in the groups: these, and an `initial_lr` of its own.
_CYCLE_KEYS = ("max_lr", "min_lr")
_OPTIMIZER_KEYS = ("betas", "eps", "momentum", "nesterov", "amsgrad", "ns_steps", "adjust_lr_fn")
_PRECISION = 1e-6  # relative tolerance, because the base learning rate is a rounded quotient


def at_saved_scale(old: Group, new: Group) -> Group:
    """Return a group with the initial scale of the saved one.

    A resumed run builds its groups from trained weights, so their scale is not the initial one.
    """
    if "init_scale" not in old or "init_scale" not in new:
        return new
    change = old["init_scale"] / new["init_scale"]
    multiplied = {key: new[key] * change for key in ("lr", "initial_lr", "lr_ratio") if key in new}
    divided = {key: new[key] / change for key in ("weight_decay", "peak_weight_decay") if key in new}
    return {**new, **multiplied, **divided, **{key: old[key] for key in _SCALE_KEYS if key in old}}


def named_ratios(saved: Sequence[Group], groups: Sequence[Group]) -> str:
    """Spell the saved ratios as an argument if they differ and have a name, such as an earlier version's default."""
    if all(math.isclose(_ratio(old), _ratio(new), rel_tol=_PRECISION) for old, new in zip(saved, groups)):
        return ""
    for name, known in NAMED_RATIOS.items():
        ratios = {block.value: ratio for block, ratio in known.items()}
        if all(math.isclose(ratios.get(_block(group), 1.0), _ratio(group)) for group in saved):
            return f' (ratios="{name}")'
    return ""


def rate_differences(saved: Sequence[Group], groups: Sequence[Group], ratios_moved: bool) -> Iterator[str]:
    """Yield the differences in base learning rate, ratio and ``decay``, in words.

    Args:
        saved: the saved groups.
        groups: the groups of the optimizer.
        ratios_moved: whether a rule moves the ratios, so that other ratios are no difference.
    """
    pairs = [(old, new) for old, new in zip(saved, groups) if "initial_lr" in old]
    for old, new in pairs:
        there, here = _base(old), _base(new)
        if _same_cycle(old, new) and not math.isclose(there, here, rel_tol=_PRECISION):
            yield f"base learning rate is {there:.8g} there and {here:.8g} here"
    for old, new in pairs:
        there, here = _ratio(old), _ratio(new)
        if not ratios_moved and not math.isclose(there, here, rel_tol=_PRECISION):
            yield f"ratio of {_block(new)} is {there:.8g} there and {here:.8g} here"
    for old, new in pairs:
        if _decay(old) != _decay(new):
            yield f"decay is {_decay(old)} there and {_decay(new)} here"


def other_differences(saved: Sequence[Group], groups: Sequence[Group]) -> Iterator[str]:
    """Yield the differences in weight decay and in the optimizer's hyperparameters, in words.

    The weight decay of groups with ``decay="constant"`` is the one at the base learning rate.
    """
    for old, new in zip(saved, groups):
        if "weight_decay" in old and "weight_decay" in new:
            there, here = _given_decay(old), _given_decay(new)
            if not _same(there, here):
                yield f"weight_decay of {_block(new)} is {there:.8g} there and {here:.8g} here"
        for key in _OPTIMIZER_KEYS:
            if key in old and key in new and not _same(old[key], new[key]):
                yield f"{key} is {_spell(old[key])} there and {_spell(new[key])} here"


def merge_settings(old: Group, new: Group, *, use_new: bool, ratios_moved: bool) -> dict[str, Any]:
    """Return the group to load.

    Args:
        old: the saved group.
        new: the group of the optimizer, with the requested settings.
        use_new: take the requested settings. Otherwise the saved ones are taken.
        ratios_moved: whether a rule moves the ratios; the saved ratios are then taken in any case.
    """
    merged = {**{key: new[key] for key in _OUR_KEYS if key in new}, **old}
    merged |= {key: new[key] for key in _CONTENT_KEYS if key in new}
    if use_new:
        merged |= {key: new[key] for key in _OPTIMIZER_KEYS if key in new}
        if not ratios_moved:
            merged = _replace_keys(merged, new, (*_RATE_KEYS, *_DECAY_KEYS))
        else:
            merged = _replace_keys(merged, {**new, **_decay_at_ratio(new, _ratio(old))}, _DECAY_KEYS)
            if "initial_lr" in old:
                merged["initial_lr"] = _base(new) * _ratio(old)
        merged = _replace_keys(merged, new, _CYCLE_KEYS)
    elif not _same_cycle(old, new):
        merged = _replace_keys(merged, new, ("initial_lr", *_CYCLE_KEYS))
    return merged


def _replace_keys(group: Group, new: Group, keys: Iterable[str]) -> dict[str, Any]:
    """Return a group with these keys as in another one: those that it lacks are removed."""
    kept = {key: value for key, value in group.items() if key not in keys}
    return kept | {key: new[key] for key in keys if key in new}


def _same_cycle(old: Group, new: Group) -> bool:
    """Return whether OneCycleLR has written both groups, or none. Otherwise their ``initial_lr`` differ in meaning."""
    return ("max_lr" in old) == ("max_lr" in new)


def _base(group: Group) -> float:
    return float(group.get("initial_lr", group["lr"])) / _ratio(group)


def _ratio(group: Group) -> float:
    return float(group.get("lr_ratio", 1.0))


def _block(group: Group) -> str:
    return str(group.get("block", "its group"))


def _decay(group: Group) -> str:
    return str(group.get("decay", "coupled"))


def _given_decay(group: Group) -> float:
    """Return the weight decay at the base learning rate: constant decay divides it by the ratio."""
    if _decay(group) != "constant":
        return float(group["weight_decay"])
    return float(group.get("peak_weight_decay", group["weight_decay"])) * _ratio(group)


def _decay_at_ratio(group: Group, ratio: float) -> dict[str, float]:
    """Return the weight decay of a group as if it had another ratio."""
    if "weight_decay" not in group or _decay(group) != "constant":
        return {}
    return dict.fromkeys(("weight_decay", "peak_weight_decay"), _given_decay(group) / ratio)


def _same(there: Any, here: Any) -> bool:
    if isinstance(there, list | tuple) and isinstance(here, list | tuple):
        return len(there) == len(here) and all(map(_same, there, here))
    if isinstance(there, bool | str | None) or isinstance(here, bool | str | None):
        return bool(there == here)
    return math.isclose(float(there), float(here), rel_tol=_PRECISION)


def _spell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_spell, value))})"
    return str(value) if isinstance(value, bool | str | None) else f"{float(value):g}"
