"""Compare the groups of a saved optimizer state with those that the optimizer was created with.

``optimizer.load_state_dict`` replaces the settings of the groups by the saved ones, including learning rates and
ratios. Without this comparison, a run resumed with other ratios would silently continue with the old ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch.optim import Optimizer

from blockwise_lr.blocks import canonical_name
from blockwise_lr.optim.saved_settings import (
    MOVING,
    Group,
    at_saved_scale,
    merge_settings,
    named_ratios,
    other_differences,
    rate_differences,
)

OnChange = Literal["error", "use_new"]

_SHOWN = 4  # number of differences that a message lists


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
    groups = [at_saved_scale(old, new) for old, new in zip(saved, groups)]
    ratios_moved = has_moving_ratios(saved) or has_moving_ratios(groups)
    differences = list(dict.fromkeys(rate_differences(saved, groups, ratios_moved)))
    others = list(dict.fromkeys(other_differences(saved, groups)))
    if differences and on_change == "error":
        raise ValueError(
            f"the saved optimizer has other settings: {join_differences(differences)}; make the groups as they were"
            f'{named_ratios(saved, groups)}, or go on with the new ones by on_change="use_new"'
        )
    if on_change == "use_new" and (differences or others):
        note(f"the optimizer goes on with new settings: {join_differences(differences + others)}")
    elif others:
        note(
            f"the saved optimizer has other settings, which are used: {join_differences(others)}; "
            'on_change="use_new" takes the new ones'
        )
    use_new = on_change == "use_new"
    merged = [
        merge_settings(old, new, use_new=use_new, ratios_moved=ratios_moved)
        for old, new in zip(saved, groups)
    ]
    return {**state_dict, "param_groups": merged}


def has_moving_ratios(groups: Sequence[Group]) -> bool:
    """Return whether a rule such as AutoRatios moves the ratios of these groups, or has moved them."""
    return any(key.startswith(MOVING) for group in groups for key in group if isinstance(key, str))


def without_moving_state(group: Group) -> dict[str, Any]:
    """Return a copy of the group without the state of a rule that moves ratios."""
    return {key: value for key, value in group.items() if not key.startswith(MOVING)}


def describe_other_parameters(saved: Sequence[Group], groups: Sequence[Group]) -> str | None:
    """Describe how the parameters of the saved groups differ from those of the optimizer.

    A state of Adam-mini and one of another optimizer differ too, because the shapes of their second moments do.

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
        return _describe_other_moments(saved, groups)
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


def _describe_other_moments(saved: Sequence[Group], groups: Sequence[Group]) -> str | None:
    """Describe that only one of the two optimizers is Adam-mini, whose groups alone have partitions."""
    there, here = (any("partitions" in group for group in each) for each in (saved, groups))
    if there == here:
        return None
    kinds = ("Adam-mini", "another optimizer") if there else ("another optimizer", "Adam-mini")
    return f"the saved optimizer has moments of other shapes: it is {kinds[0]} there and {kinds[1]} here"


def _place(block: str | None) -> str:
    return "no group" if block is None else f"block {block}"


def join_differences(differences: Sequence[str]) -> str:
    """Join the first differences, and state how many more there are."""
    more = len(differences) - _SHOWN
    return "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
