"""An optimizer's state handed over: from other groups, from fused weights to split ones and back, to Adam-mini."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockwise_lr.arguments import check_model
from blockwise_lr.blocks import canonical_name
from blockwise_lr.blocks.model_facts import ModelFacts
from blockwise_lr.blocks.split_weights import FusedWeight, any_sharded
from blockwise_lr.optimizers.adam_mini_kernel import spread
from blockwise_lr.optimizers.converted_state import State, converted, copied
from blockwise_lr.optimizers.kept_state import learn_kept_state, shape_of_second, unwrapped
from blockwise_lr.optimizers.old_state import PART, Entry, by_name, fused_name, listed

_UNKNOWN = object()


def adopt_state(
    old: Mapping[str, Any] | Optimizer,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    names: Sequence[Sequence[str]] | None = None,
    changed: Literal["error", "adopt"] = "error",
) -> None:
    """Give a new optimizer the moments of an old one, so that a run goes on with a learning rate per block.

    The old state may be of other groups (one for all, Trainer's pair with and without decay, those of
    :func:`param_groups`), of fused weights where the model is split now, of the parts where it is merged now, and of
    another optimizer. Moments that mean the same go over: between the Adams (v averaged over the pieces of
    :class:`AdamMini`, or repeated over them), and averages of the gradient to Lion and Muon. They take the dtype and
    the device that the new optimizer itself would give them. Where the old state does not have all that the new
    optimizer needs, these parameters start without state, and a warning names them.

    With all ratios 1 and the same kind of optimizer the run goes on to the bit. Learning rates and decays are the new
    groups'; a schedule goes on with ``last_epoch``.

    Args:
        old: ``state_dict()`` of the old optimizer (the content of Trainer's optimizer.pt), or that optimizer.
        model: the model that was trained, split or merged as the new optimizer has it.
        optimizer: the new one, on groups of :func:`param_groups`, before its first step. Changed in place.
        names: the parameters' names in each of the old groups, in order. Default: those that the groups carry
            (``names``, or torch's ``param_names``, or names in place of parameters); else, of one group, the model's
            own order, and of two, the order of transformers' Trainer.
        changed: what to do about parameters of the model that were trained then and are frozen now, or the other way
            round. "error" (default) names them; "adopt" leaves out the moments of those that are frozen now, and
            starts those that are trained now without any.

    Raises:
        ValueError: the names are not known or do not fit the model; a moment does not fit its parameter; sharded
            tensors; a group of the new optimizer without ``names``; other parameters are trained than then. The new
            optimizer is as it was then.

    Example:
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
    optimizer = unwrapped(optimizer)
    given = by_name(old.state_dict() if isinstance(old, Optimizer) else old, model, names)
    fused = _layouts(model)
    found: dict[nn.Parameter, State] = {}
    counts: dict[int, int] = {}
    used: set[str] = set()
    fresh: dict[str, list[str]] = {}
    known: dict[Any, Any] = {}
    for name, (parameter, group, partition) in _parameters_of(optimizer).items():
        entry, sources = _for(name, given, fused, changed)
        used.update(sources)
        if not entry.state:  # one that was never stepped, or is trained only now
            continue
        if any_sharded([parameter, *entry.state.values()]):
            raise ValueError(f"the state of {name} is sharded: adopt the full state before fully_shard")
        state, missing = _converted(name, entry, optimizer, group, parameter, partition, known)
        if missing:
            fresh[name] = missing
            continue
        found[parameter] = state
        if entry.steps is not None:
            counts[id(group)] = max(counts.get(id(group), 0), entry.steps)
    _check_left({name: entry for name, entry in given.items() if name not in used}, model, changed)
    for parameter, state in found.items():
        optimizer.state[parameter] = state
    for group in optimizer.param_groups:
        if id(group) in counts and any(
            kept and kept[1] for key, kept in known.items() if key[0] == id(group)
        ):
            group["step"] = counts[id(group)]
    if fresh:
        needed = ", ".join(dict.fromkeys(key for missing in fresh.values() for key in missing))
        warnings.warn(
            f"the old state does not have what {type(optimizer).__name__} keeps ({needed}) for {len(fresh)} parameters "
            f"({listed(list(fresh))}), so these start without state; warm the learning rate up again for them",
            stacklevel=2,
        )


def _converted(
    name: str,
    entry: Entry,
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameter: nn.Parameter,
    partition: list[int] | None,
    known: dict[Any, Any],
) -> tuple[State, list[str]]:
    """The state of one parameter as the new optimizer keeps it, and what is missing for it."""
    kept = learn_kept_state(optimizer, group, parameter, known)
    try:
        if kept is None:
            return copied(entry.state, group, parameter), []
        second = shape_of_second(optimizer, parameter, partition)
        found = converted(entry.state, entry.steps, entry.group, kept, group, parameter, second)
    except ValueError as error:
        key, _, rest = str(error).partition(" ")
        raise ValueError(f"{key} of {name} {rest}") from None
    return ({}, found) if isinstance(found, list) else (found, [])


def _check_left(left: Mapping[str, Entry], model: nn.Module, changed: str) -> None:
    """Refuse moments that no parameter took, but those of parameters that the model has frozen since."""
    own = {fused_name(canonical_name(name)) for name, _ in model.named_parameters(remove_duplicate=False)}
    strange = [name for name in left if fused_name(name) not in own]
    frozen = [name for name, entry in left.items() if entry.state and changed == "error"]
    if strange or frozen:
        shown = strange or frozen
        raise ValueError(
            f"the old state has moments of {len(shown)} parameters that the new optimizer does not train "
            f"({listed(sorted(shown))}): "
            + (
                "is it this model's?"
                if strange
                else 'if they were frozen since, adopt_state(..., changed="adopt") leaves them out'
            )
        )


def _parameters_of(optimizer: Optimizer) -> dict[str, tuple[nn.Parameter, dict[str, Any], list[int] | None]]:
    """By canonical name, each parameter with its group and its pieces."""
    found = {}
    for group in optimizer.param_groups:
        if "names" not in group:
            raise ValueError(
                "a group of the new optimizer has no names: make the groups with param_groups(model, lr)"
            )
        cut = group.get("partitions") or [None] * len(group["params"])
        for name, parameter, partition in zip(group["names"], group["params"], cut):
            found[canonical_name(name)] = (parameter, group, partition)
    return found


# Layouts -------------------------------------------------------------------------------------------


def _layouts(model: nn.Module) -> dict[str, FusedWeight]:
    """By its original name, how each fused weight of the model is put together, split now or not."""
    found: dict[str, FusedWeight] = {}
    facts = ModelFacts(model)
    for (path, leaf), projection in facts.projections.items():
        if projection.fused and projection.repeats is not None:
            parts, sizes = zip(*projection.parts)
            found[f"{path}.{leaf}" if path else leaf] = FusedWeight(
                parts, sizes, projection.dim, projection.repeats
            )
    return found


def _for(
    name: str, given: Mapping[str, Entry], fused: Mapping[str, FusedWeight], changed: str
) -> tuple[Entry, list[str]]:
    """The old state of a parameter in its present layout, and the names that it is from."""
    if name in given:
        return given[name], [name]
    part, layout = PART.fullmatch(name), fused.get(fused_name(name))
    if part and layout and fused_name(name) in given:
        whole = given[fused_name(name)]
        cut = {key: _part(key, value, layout, int(part["index"])) for key, value in whole.state.items()}
        return whole._replace(state={key: value for key, value in cut.items() if value is not _UNKNOWN}), [
            fused_name(name)
        ]
    if layout:
        path, _, leaf = name.rpartition(".")
        prefix = f"{path}.parametrizations" if path else "parametrizations"
        names = [f"{prefix}.{leaf}.original{i}" for i in range(len(layout.sizes))]
        entries = [given[each] for each in names if each in given]
        if len(entries) == len(names) and len({bool(entry.state) for entry in entries}) == 1:
            return entries[0]._replace(state=_joined([each.state for each in entries], layout)), names
    if changed == "adopt":
        return Entry({}, None, {}), []
    raise ValueError(
        f"the old state has nothing for {name}; it has {listed(sorted(given))}: is it this model's? If {name} was "
        'frozen then, adopt_state(..., changed="adopt") starts it without state'
    )


def _part(key: str, value: Any, layout: FusedWeight, index: int) -> Any:
    """What a moment of a fused weight says of one part; _UNKNOWN where it is of another form."""
    if isinstance(value, (list, tuple)):  # SOAP's matrices are of the whole weight
        return _UNKNOWN
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape[layout.dim] == 1 != sum(layout.sizes):  # one for all outputs, as Adafactor keeps it
        return value
    if value.shape[layout.dim] != sum(layout.sizes):
        raise ValueError(
            f"a moment of shape {tuple(value.shape)} cannot be split into {layout.sizes}: expected one of the fused "
            "weight's shape"
        )
    return layout.right_inverse(value)[index]


def _joined(states: Sequence[State], layout: FusedWeight) -> State:
    joined: State = {}
    for key, first in states[0].items():
        if isinstance(first, (list, tuple)) or not all(key in state for state in states):
            continue
        values = [state[key] for state in states]
        if isinstance(first, Tensor) and first.ndim:
            shapes = [_spread_shape(value, size, layout.dim) for value, size in zip(values, layout.sizes)]
            joined[key] = layout.fuse([spread(value, shape) for value, shape in zip(values, shapes)])
        else:
            joined[key] = first
    return joined


def _spread_shape(value: Tensor, size: int, dim: int) -> torch.Size:
    """The shape with every output of a part apart: the inputs may still be one for all."""
    return torch.Size(size if d == dim else n for d, n in enumerate(value.shape))
