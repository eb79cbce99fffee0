"""Compare the groups of a saved optimizer state with those that the optimizer was created with.

``optimizer.load_state_dict`` replaces the settings of the groups by the saved ones, including learning rates and
ratios. Without this comparison, a run resumed with other ratios would silently continue with the old ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch.optim import Optimizer

from blockwise_lr.blocks import canonical_name
from blockwise_lr.optim.ratios import NAMED_RATIOS

OnChange = Literal["error", "use_new"]
Group = Mapping[str, Any]

_MOVING = "auto_"  # prefix of the keys under which a rule that moves ratios keeps its state in the groups
MOVES = f"{_MOVING}moves"  # the key that such a rule sets in every group
_SCALE_KEYS = ("init_scale", "init_rms")
_OUR_KEYS = ("initial_lr", "lr_ratio", "block", "decay", "names", "name", "partitions", *_SCALE_KEYS, MOVES)
_RATE_KEYS = ("initial_lr", "lr_ratio", "decay", "weight_decay", "peak_weight_decay")
_OPTIMIZER_KEYS = ("betas", "eps", "momentum", "nesterov", "amsgrad", "ns_steps", "adjust_lr_fn")
_SHOWN = 4  # number of differences that a message lists
_PRECISION = 1e-6  # relative tolerance, because the base learning rate is a rounded quotient


def check_on_change(on_change: OnChange) -> None:
    """Check the argument `on_change`.

    Raises:
        ValueError: it is neither "error" nor "use_new".
    """
    if on_change not in ("error", "use_new"):
        raise ValueError(f'on_change is {on_change!r}; expected "error" or "use_new"')


def load_optimizer_state(
    optimizer: Optimizer, state_dict: Mapping[str, Any], *, on_change: OnChange = "error"
) -> None:
    """Load the state of an optimizer after comparing the saved learning rates and ratios with the current ones.

    If a schedule of this library already exists for the optimizer, ``optimizer.load_state_dict`` does the same. Use
    this function in loops that load the optimizer before they create the schedule.

    Args:
        optimizer: an optimizer on groups of :func:`blockwise_lr.param_groups`, with the settings to resume with.
        state_dict: ``state_dict()`` of the saved optimizer.
        on_change: what to do if the base learning rate, the ratios or ``decay`` differ from the saved ones.
            "error" (default) raises ValueError. "use_new" keeps the settings of the optimizer, including its weight
            decay and betas, and loads only the moments. Ratios that :class:`blockwise_lr.AutoRatios` has moved do not
            count as a difference and are loaded.

    Raises:
        ValueError: the settings differ and on_change is "error"; or the saved groups hold other parameters.

    Example:
        >>> import torch
        >>> from blockwise_lr import param_groups
        >>> model = torch.nn.ModuleDict({"wte": torch.nn.Embedding(8, 4), "ln_f": torch.nn.LayerNorm(4)})
        >>> saved = torch.optim.AdamW(param_groups(model, lr=1e-3)).state_dict()
        >>> resumed = torch.optim.AdamW(param_groups(model, lr=2e-3))
        >>> load_optimizer_state(resumed, saved)
        Traceback (most recent call last):
            ...
        ValueError: the saved optimizer has other settings: base learning rate is 0.001 there and 0.002 here; ...
    """
    check_on_change(on_change)
    optimizer.load_state_dict(dict(reconcile(state_dict, optimizer.param_groups, on_change)))


def reconcile(
    state_dict: Mapping[str, Any],
    groups: Sequence[Group],
    on_change: OnChange,
    note: Callable[[str], None] | None = None,
) -> Mapping[str, Any]:
    """Return the saved state with the settings to use from now on.

    Args:
        state_dict: the saved state. It is not changed.
        groups: the groups of the optimizer, with the requested settings.
        on_change: as in :func:`load_optimizer_state`.
        note: called with the description of each change that is not an error. Default: issue a warning.

    Raises:
        ValueError: as in :func:`load_optimizer_state`.
    """
    note = note or _warn
    saved: Sequence[Group] = state_dict.get("param_groups", ())
    if problem := describe_other_parameters(saved, groups):
        raise ValueError(
            f"{problem}: make the groups as they were, or carry the moments over by parameter name, with "
            "adopt_state(state, model, optimizer), and give the schedule last_epoch"
        )
    if len(saved) != len(groups):
        return state_dict  # groups without names, which torch refuses
    groups = [_at_saved_scale(old, new) for old, new in zip(saved, groups)]
    ratios_moved = has_moving_ratios(saved) or has_moving_ratios(groups)
    differences = list(dict.fromkeys(_rate_differences(saved, groups, ratios_moved)))
    others = list(dict.fromkeys(_other_differences(saved, groups, ratios_moved)))
    if differences and on_change == "error":
        raise ValueError(
            f"the saved optimizer has other settings: {join_differences(differences)}; make the groups as they were"
            f'{_named_ratios(saved, groups)}, or go on with the new ones by on_change="use_new"'
        )
    if on_change == "use_new" and (differences or others):
        note(f"the optimizer goes on with new settings: {join_differences(differences + others)}")
    elif others:
        note(
            f"the saved optimizer has other settings, which are used: {join_differences(others)}; "
            'on_change="use_new" takes the new ones'
        )
    merged = [_merge_settings(old, new, on_change, ratios_moved) for old, new in zip(saved, groups)]
    return {**state_dict, "param_groups": merged}


def _at_saved_scale(old: Group, new: Group) -> Group:
    """Return a group with the initial scale of the saved one.

    A resumed run builds its groups from trained weights, so their scale is not the initial one.
    """
    if "init_scale" not in old or "init_scale" not in new:
        return new
    change = old["init_scale"] / new["init_scale"]
    multiplied = {key: new[key] * change for key in ("lr", "initial_lr", "lr_ratio") if key in new}
    divided = {key: new[key] / change for key in ("weight_decay", "peak_weight_decay") if key in new}
    return {**new, **multiplied, **divided, **{key: old[key] for key in _SCALE_KEYS if key in old}}


def _named_ratios(saved: Sequence[Group], groups: Sequence[Group]) -> str:
    """Spell the saved ratios as an argument if they differ and have a name, such as an earlier version's default."""
    if all(math.isclose(_ratio(old), _ratio(new), rel_tol=_PRECISION) for old, new in zip(saved, groups)):
        return ""
    for name, known in NAMED_RATIOS.items():
        ratios = {block.value: ratio for block, ratio in known.items()}
        if all(math.isclose(ratios.get(_block(group), 1.0), _ratio(group)) for group in saved):
            return f' (ratios="{name}")'
    return ""


def has_moving_ratios(groups: Sequence[Group]) -> bool:
    """Return whether a rule such as AutoRatios moves the ratios of these groups, or has moved them."""
    return any(key.startswith(_MOVING) for group in groups for key in group if isinstance(key, str))


def without_moving_state(group: Group) -> dict[str, Any]:
    """Return a copy of the group without the state of a rule that moves ratios."""
    return {key: value for key, value in group.items() if not key.startswith(_MOVING)}


def describe_other_parameters(saved: Sequence[Group], groups: Sequence[Group]) -> str | None:
    """Describe how the parameters of the saved groups differ from those of the optimizer.

    Returns:
        The description; None if the parameters are the same, or if the groups have no names.
    """
    if not all("names" in group for group in groups):
        return None
    here = [[canonical_name(name) for name in group["names"]] for group in groups]
    if not all("names" in group for group in saved):
        there = [len(group["params"]) for group in saved]
        if there == list(map(len, here)):
            return None
        return (
            f"the saved optimizer has groups of {there} parameters without names, as torch and transformers' Trainer "
            f"make them, and this one has groups by block of {list(map(len, here))}"
        )
    named = [[canonical_name(name) for name in group["names"]] for group in saved]
    if named == here:
        return None
    places = [{name: group["block"] for own, group in zip(*each) for name in own}
              for each in ((named, saved), (here, groups))]  # fmt: skip
    differences = [
        f"{name} is in {_place(places[0].get(name))} there and in {_place(places[1].get(name))} here"
        for name in dict.fromkeys([*places[1], *places[0]])
        if places[0].get(name) != places[1].get(name)
    ]
    if not differences:
        differences = [f"{len(saved)} groups of {list(map(len, named))} parameters there and {len(groups)} of "
                       f"{list(map(len, here))} here"]  # fmt: skip
    return f"the saved optimizer has other groups: {join_differences(differences)}"


def _place(block: str | None) -> str:
    return "no group" if block is None else f"block {block}"


def join_differences(differences: Sequence[str]) -> str:
    """Join the first differences, and state how many more there are."""
    more = len(differences) - _SHOWN
    return "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _rate_differences(saved: Sequence[Group], groups: Sequence[Group], ratios_moved: bool) -> Iterator[str]:
    pairs = [(old, new) for old, new in zip(saved, groups) if "initial_lr" in old]
    for old, new in pairs:
        there, here = _base(old), _base(new)
        if not math.isclose(there, here, rel_tol=_PRECISION):
            yield f"base learning rate is {there:.8g} there and {here:.8g} here"
    for old, new in pairs:
        there, here = _ratio(old), _ratio(new)
        if not ratios_moved and not math.isclose(there, here, rel_tol=_PRECISION):
            yield f"ratio of {_block(new)} is {there:.8g} there and {here:.8g} here"
    for old, new in pairs:
        if old.get("decay", "coupled") != new.get("decay", "coupled"):
            yield f"decay is {old.get('decay', 'coupled')} there and {new.get('decay', 'coupled')} here"


def _other_differences(saved: Sequence[Group], groups: Sequence[Group], ratios_moved: bool) -> Iterator[str]:
    for old, new in zip(saved, groups):
        constant = new.get("decay") == "constant"
        if not (constant and ratios_moved):  # AutoRatios changes the weight decay inversely to the ratio
            key = "peak_weight_decay" if constant and "peak_weight_decay" in old else "weight_decay"
            if key in old and not _same(old[key], new.get(key, old[key])):
                yield f"weight_decay of {_block(new)} is {old[key]:.8g} there and {new[key]:.8g} here"
        for key in _OPTIMIZER_KEYS:
            if key in old and key in new and not _same(old[key], new[key]):
                yield f"{key} is {_spell(old[key])} there and {_spell(new[key])} here"


def _merge_settings(old: Group, new: Group, on_change: OnChange, ratios_moved: bool) -> dict[str, Any]:
    merged = {**{key: new[key] for key in _OUR_KEYS if key in new}, **old}
    if on_change == "use_new":
        merged |= {key: new[key] for key in _OPTIMIZER_KEYS if key in new}
        if not ratios_moved:
            merged = {key: value for key, value in merged.items() if key not in _SCALE_KEYS}
            merged |= {key: new[key] for key in ("lr", *_RATE_KEYS, *_SCALE_KEYS) if key in new}
        elif "initial_lr" in old:
            merged["initial_lr"] = _base(new) * _ratio(old)
    return merged


def _base(group: Group) -> float:
    return float(group.get("initial_lr", group["lr"])) / _ratio(group)


def _ratio(group: Group) -> float:
    return float(group.get("lr_ratio", 1.0))


def _block(group: Group) -> str:
    return str(group.get("block", "its group"))


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


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
