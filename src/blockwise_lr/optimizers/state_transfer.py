"""Transfer the state of an optimizer to a new one.

The new optimizer may have other groups or another class. It may have split weights in place of fused ones, or the
reverse.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from blockwise_lr.arguments import check_model
from blockwise_lr.blocks import canonical_name
from blockwise_lr.blocks.weight_parts import any_sharded
from blockwise_lr.optimizers.fused_states import fused_layouts, source_of
from blockwise_lr.optimizers.named_state import Entry, listed, name_before_split, state_by_name
from blockwise_lr.optimizers.state_conversion import State, convert_state, copy_state
from blockwise_lr.optimizers.state_template import learn_state_template, second_moment_shape, unwrap_optimizer

Trials = dict[Any, Any]  # the cache of learn_state_template


def adopt_state(
    old: Mapping[str, Any] | Optimizer,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    names: Sequence[Sequence[str]] | None = None,
    changed: Literal["error", "adopt"] = "error",
) -> None:
    """Copy the moments of an old optimizer into a new one, so that a run can continue with a learning rate per block.

    The old optimizer may differ from the new one in three ways:

    - other groups: one for all parameters, Trainer's pair with and without weight decay, or those of
      :func:`param_groups`;
    - fused weights where the model is now split, or split weights where it is now fused;
    - another class of optimizer. Moments with the same meaning are converted. The second moment v is converted between
      the Adam variants: it is averaged over the pieces of :class:`AdamMini`, or repeated over them. Averages of the
      gradient are also copied to Lion and Muon.

    Each moment gets the dtype and device that the new optimizer itself would use. A parameter starts without state if
    the old state lacks a value that the new optimizer needs; a warning names these parameters.

    If all ratios are 1 and the optimizer has the same class, training continues exactly, to the bit. Learning rates and
    weight decays are those of the new groups. To continue a schedule, create the new one with ``last_epoch``.

    Args:
        old: ``state_dict()`` of the old optimizer (the content of Trainer's optimizer.pt), or that optimizer.
        model: the trained model, split or merged as for the new optimizer.
        optimizer: the new optimizer, on groups of :func:`param_groups`, before its first step. It is changed in place.
        names: names of the parameters in each of the old groups, in order. Default: the names that the groups contain
            (``names``, torch's ``param_names``, or names in place of parameters). If the groups contain no names, the
            order is assumed: that of the model for one group, and that of transformers' Trainer for two.
        changed: what to do if parameters have been frozen or unfrozen since. "error" (default) raises ValueError and
            names them. "adopt" drops the moments of parameters that are now frozen, and starts newly trained
            parameters without state.

    Raises:
        ValueError: the names are unknown or do not fit the model; a moment does not fit its parameter; a tensor is
            sharded; a group of the new optimizer has no ``names``; or parameters have been frozen or unfrozen since. In
            all these cases, the new optimizer is unchanged.

    Example:
        >>> import torch
        >>> from blockwise_lr import param_groups, split_fused
        >>> model = nn.MultiheadAttention(8, num_heads=2, bias=False)
        >>> old = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> model(*[torch.ones(1, 8)] * 3)[0].sum().backward(); old.step()
        >>> new = torch.optim.AdamW(param_groups(split_fused(model), lr=1e-3), lr=1e-3)
        >>> adopt_state(old.state_dict(), model, new)
        >>> {tuple(state["exp_avg"].shape) for state in new.state.values()}
        {(8, 8)}
    """
    check_model(model, "adopt_state")
    if changed not in ("error", "adopt"):
        raise ValueError(f'changed is {changed!r}; expected "error" or "adopt"')
    optimizer = unwrap_optimizer(optimizer)
    old_states = state_by_name(old.state_dict() if isinstance(old, Optimizer) else old, model, names)
    fused = fused_layouts(model)
    new_states: dict[nn.Parameter, State] = {}
    counts: dict[int, int] = {}
    used: set[str] = set()
    without_state: dict[str, list[str]] = {}
    trials: Trials = {}
    for name, (parameter, group, partition) in _parameters_by_name(optimizer).items():
        entry, sources = source_of(name, old_states, fused, changed)
        used.update(sources)
        if not entry.state:  # the parameter was never stepped, or was frozen before
            continue
        if any_sharded([parameter, *entry.state.values()]):
            raise ValueError(f"the state of {name} is sharded: adopt the full state before fully_shard")
        state, missing = _convert_entry(name, entry, optimizer, group, parameter, partition, trials)
        if missing:
            without_state[name] = missing
            continue
        new_states[parameter] = state
        if entry.steps is not None:
            counts[id(group)] = max(counts.get(id(group), 0), entry.steps)
    _check_unused({name: entry for name, entry in old_states.items() if name not in used}, model, changed)
    for parameter, state in new_states.items():
        optimizer.state[parameter] = state
    for group in optimizer.param_groups:
        # trial[1] is True if the optimizer counts its steps in the group, and not in the state.
        if id(group) in counts and any(
            trial and trial[1] for key, trial in trials.items() if key[0] == id(group)
        ):
            group["step"] = counts[id(group)]
    if without_state:
        needed = ", ".join(dict.fromkeys(key for missing in without_state.values() for key in missing))
        warnings.warn(
            f"the old state does not have what {type(optimizer).__name__} keeps ({needed}) for {len(without_state)} "
            f"parameters ({listed(list(without_state))}), so these start without state; "
            "warm the learning rate up again for them",
            stacklevel=2,
        )


def _convert_entry(
    name: str,
    entry: Entry,
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameter: nn.Parameter,
    partition: list[int] | None,
    trials: Trials,
) -> tuple[State, list[str]]:
    """Return the state of one parameter in the form of the new optimizer, and the names of missing values."""
    template = learn_state_template(optimizer, group, parameter, trials)
    try:
        if template is None:
            return copy_state(entry.state, group, parameter), []
        second = second_moment_shape(optimizer, parameter, partition)
        converted = convert_state(entry.state, entry.steps, entry.group, template, group, parameter, second)
    except ValueError as error:
        key, _, rest = str(error).partition(" ")  # the message begins with the name of the moment
        raise ValueError(f"{key} of {name} {rest}") from None
    return ({}, converted) if isinstance(converted, list) else (converted, [])  # a list names missing values


def _check_unused(unused: Mapping[str, Entry], model: nn.Module, changed: str) -> None:
    """Check the old moments that no parameter of the new optimizer uses.

    Raises:
        ValueError: the model has no such parameter, or the parameter is now frozen and `changed` is "error".
    """
    own = {
        name_before_split(canonical_name(name)) for name, _ in model.named_parameters(remove_duplicate=False)
    }
    unknown = [name for name in unused if name_before_split(name) not in own]
    frozen = [name for name, entry in unused.items() if entry.state and changed == "error"]
    if unknown or frozen:
        shown = unknown or frozen
        raise ValueError(
            f"the old state has moments of {len(shown)} parameters that the new optimizer does not train "
            f"({listed(sorted(shown))}): "
            + (
                "expected a state of this model: load the one that was saved with it"
                if unknown
                else 'if they were frozen since, adopt_state(..., changed="adopt") leaves them out'
            )
        )


def _parameters_by_name(
    optimizer: Optimizer,
) -> dict[str, tuple[nn.Parameter, dict[str, Any], list[int] | None]]:
    """Return each parameter with its group and its number of pieces per dimension, by canonical name."""
    found = {}
    for group in optimizer.param_groups:
        if "names" not in group:
            raise ValueError(
                "a group of the new optimizer has no names: make the groups with param_groups(model, lr)"
            )
        partitions = group.get("partitions") or [None] * len(group["params"])
        for name, parameter, partition in zip(group["names"], group["params"], partitions):
            found[canonical_name(name)] = (parameter, group, partition)
    return found
