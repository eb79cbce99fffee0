"""An optimizer's state handed over: from other groups, from fused weights to split ones and back, to Adam-mini."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockwise_lr.arguments import check_model
from blockwise_lr.blocks import canonical_name
from blockwise_lr.blocks.layout import Concatenation, any_sharded, split_state
from blockwise_lr.blocks.model import ModelFacts
from blockwise_lr.extras import is_installed
from blockwise_lr.optim.adam_mini import AdamMini
from blockwise_lr.optim.partitions import spread

State = dict[str, Any]
_PART = re.compile(r"(?P<before>(?:.*\.)?)parametrizations\.(?P<leaf>\w+)\.original(?P<index>\d+)")
_SHOWN = 5  # names that a message lists


def adopt_state(
    old: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    names: Sequence[Sequence[str]] | None = None,
) -> None:
    """Give a new optimizer the moments of an old one, so that a run goes on with a learning rate per block.

    The old state may be of other groups (one for all, Trainer's pair with and without decay, those of
    :func:`param_groups`), of fused weights where the model is split now, of the parts where it is merged now, and of
    AdamW where the new optimizer is :class:`AdamMini` (v averaged over its pieces) or the other way round (v repeated).
    With all ratios 1 and the same kind of optimizer the run goes on to the bit. Learning rates and decays are the new
    groups'; a schedule goes on with ``last_epoch``.

    Args:
        old: ``state_dict()`` of the old optimizer.
        model: the model that was trained, split or merged as the new optimizer has it.
        optimizer: the new one, on groups of :func:`param_groups`, before its first step. Changed in place.
        names: the parameters' names in each of the old groups, in order. Default: those that the groups carry
            (``names``, or torch's ``param_names``); else, of one group, the model's own order, and of two, the order
            of transformers' Trainer.

    Raises:
        ValueError: the names are not known or do not fit the model; a moment does not fit its parameter; sharded
            tensors; a group of the new optimizer without ``names``. The new optimizer is as it was then.

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
    given = _by_name(old, model, names)
    wanted = dict(_parameters_of(optimizer))
    fused = _layouts(model)
    found: dict[nn.Parameter, State] = {}
    used: set[str] = set()
    for name, (parameter, partition) in wanted.items():
        state, sources = _for(name, given, fused)
        used.update(sources)
        found[parameter] = {
            key: _fitted(name, key, value, parameter, partition) for key, value in state.items()
        }
    if left := sorted(set(given) - used):
        raise ValueError(
            f"the old state has moments of {len(left)} parameters that the new optimizer does not train "
            f"({_list(left)}): is it this model's?"
        )
    for parameter, state in found.items():
        if state:  # one that was never stepped has none
            optimizer.state[parameter] = state


# Names ---------------------------------------------------------------------------------------------


def _by_name(
    old: Mapping[str, Any], model: nn.Module, names: Sequence[Sequence[str]] | None
) -> dict[str, State]:
    """The old state by canonical parameter name."""
    if not {"state", "param_groups"} <= set(old):
        raise ValueError(
            f"the old state has the keys {_list(sorted(map(str, old)))}; expected an optimizer's state_dict(), with "
            "`state` and `param_groups`"
        )
    groups = old["param_groups"]
    carried = [group.get("names", group.get("param_names")) for group in groups]
    chosen = names if names is not None else carried if all(carried) else _inferred(groups, model)
    counts = [len(group["params"]) for group in groups]
    if [len(each) for each in chosen] != counts:
        raise ValueError(
            f"names are given for groups of {[len(each) for each in chosen]} parameters, and the old state has groups "
            f"of {counts}"
        )
    pairs = [(name, key) for own, group in zip(chosen, groups) for name, key in zip(own, group["params"])]
    return {canonical_name(name): dict(old["state"].get(key, {})) for name, key in pairs}


def _inferred(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> list[list[str]]:
    """The names in the order in which torch, or transformers' Trainer, takes a model's parameters."""
    counts, whole = [len(group["params"]) for group in groups], list(_original_names(model))
    if counts == [len(whole)]:
        return [whole]
    if len(counts) == 2 and sum(counts) == len(whole) and is_installed("transformers"):
        from transformers import Trainer

        decayed = Trainer.get_decay_parameter_names(cast(Any, None), cast(Any, model))
        decays = {_fused_name(canonical_name(name)) for name in decayed}
        pair = [[name for name in whole if (name in decays) is wanted] for wanted in (True, False)]
        if [len(each) for each in pair] == counts:
            return pair
    raise ValueError(
        f"the old groups carry no names, and have {counts} parameters where the model has {len(whole)}: expected one "
        "group of all, or Trainer's two; give names=[[...], ...], the names in each group"
    )


def _original_names(model: nn.Module) -> Iterator[str]:
    """The names that ``named_parameters()`` gave before ``split_fused``, of what is trained, each once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix, split = canonical_name(f"{path}.") if path else "", split_state(module)
        if "parametrizations" in path.split("."):
            continue
        for leaf in split.order if split else module._parameters:
            own = module._parameters.get(leaf)
            if own is not None and (id(own) in seen or not own.requires_grad):
                continue
            if own is not None or (split and leaf in split.leaves):
                seen.add(id(own))
                yield f"{prefix}{leaf}"


def _fused_name(name: str) -> str:
    found = _PART.fullmatch(name)
    return f"{found['before']}{found['leaf']}" if found else name


def _parameters_of(optimizer: Optimizer) -> Iterator[tuple[str, tuple[nn.Parameter, Sequence[int] | None]]]:
    for group in optimizer.param_groups:
        if "names" not in group:
            raise ValueError(
                "a group of the new optimizer has no names: make the groups with param_groups(model, lr)"
            )
        cut = group["partitions"] if isinstance(optimizer, AdamMini) else [None] * len(group["params"])
        for name, parameter, partition in zip(group["names"], group["params"], cut):
            yield canonical_name(name), (parameter, partition)


# Layouts -------------------------------------------------------------------------------------------


def _layouts(model: nn.Module) -> dict[str, Concatenation]:
    """By its original name, how each fused weight of the model is put together, split now or not."""
    found: dict[str, Concatenation] = {}
    facts = ModelFacts(model)
    for (path, leaf), projection in facts.projections.items():
        if projection.fused and projection.repeats is not None:
            parts, sizes = zip(*projection.parts)
            found[f"{path}.{leaf}" if path else leaf] = Concatenation(
                parts, sizes, projection.dim, projection.repeats
            )
    return found


def _for(
    name: str, given: Mapping[str, State], fused: Mapping[str, Concatenation]
) -> tuple[State, list[str]]:
    """The old state of a parameter in its present layout, and the names that it is from."""
    if name in given:
        return given[name], [name]
    part, layout = _PART.fullmatch(name), fused.get(_fused_name(name))
    if part and layout and _fused_name(name) in given:
        whole = given[_fused_name(name)]
        return {key: _part(value, layout, int(part["index"])) for key, value in whole.items()}, [
            _fused_name(name)
        ]
    if layout:
        path, _, leaf = name.rpartition(".")
        prefix = f"{path}.parametrizations" if path else "parametrizations"
        names = [f"{prefix}.{leaf}.original{i}" for i in range(len(layout.sizes))]
        if all(each in given for each in names):
            return _joined([given[each] for each in names], layout), names
    raise ValueError(
        f"the old state has nothing for {name}; it has {_list(sorted(given))}: is it this model's?"
    )


def _part(value: Any, layout: Concatenation, index: int) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape[layout.dim] != sum(layout.sizes):
        raise ValueError(
            f"a moment of shape {tuple(value.shape)} cannot be split into {layout.sizes}: expected one of the fused "
            "weight's shape"
        )
    return layout.right_inverse(value)[index]


def _joined(states: Sequence[State], layout: Concatenation) -> State:
    joined: State = {}
    for key, first in states[0].items():
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


# Moments -------------------------------------------------------------------------------------------


def _fitted(name: str, key: str, value: Any, parameter: Tensor, partition: Sequence[int] | None) -> Any:
    """A moment as the new optimizer keeps it: repeated over what it stands for, or averaged over pieces."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value.clone() if isinstance(value, Tensor) else value
    if any_sharded([value, parameter]):
        raise ValueError(f"{key} of {name} is sharded: adopt the full state before fully_shard")
    wanted = torch.Size(partition if partition and key == "exp_avg_sq" else parameter.shape)
    if value.shape != wanted:
        fits = value.ndim == len(wanted) and all(
            max(a, b) % min(a, b) == 0 for a, b in zip(value.shape, wanted)
        )
        if not fits or key != "exp_avg_sq":
            raise ValueError(
                f"{key} of {name} has shape {tuple(value.shape)}, and its parameter {tuple(parameter.shape)}: "
                "is it this model's?"
            )
        value = _averaged(spread(value, parameter.shape), wanted)
    return value.detach().to(parameter.device).clone(memory_format=torch.contiguous_format)


def _averaged(value: Tensor, pieces: torch.Size) -> Tensor:
    """The mean over each piece."""
    for dim, count in enumerate(pieces):
        if value.shape[dim] != count:
            value = torch.unflatten(value, dim, (count, -1)).mean(dim + 1)
    return value


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
