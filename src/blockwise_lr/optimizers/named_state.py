"""Index the saved state of an optimizer by parameter name, independent of its groups."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from blockwise_lr.blocks import canonical_name
from blockwise_lr.blocks.weight_parts import split_state
from blockwise_lr.extras import is_installed

State = dict[str, Any]
PART = re.compile(r"(?P<before>(?:.*\.)?)parametrizations\.(?P<leaf>\w+)\.original(?P<index>\d+)")
_SHOWN = 5  # number of names that a message lists


class Entry(NamedTuple):
    """The old state of one parameter: its moments, the number of steps they cover, and its group."""

    state: State
    steps: int | None
    group: Mapping[str, Any]


def _entry(state: State, group: Mapping[str, Any]) -> Entry:
    count = state.get("step", group.get("step"))  # optimizers of pytorch_optimizer count steps in the group
    return Entry(state, None if count is None else int(count), group)


def state_by_name(
    old: Mapping[str, Any], model: nn.Module, names: Sequence[Sequence[str]] | None = None
) -> dict[str, Entry]:
    """Return the old state by canonical parameter name.

    Args:
        old: ``state_dict()`` of the old optimizer.
        model: the model, whose order of parameters is used if neither the groups nor `names` give the names.
        names: names of the parameters in each group.

    Raises:
        ValueError: `old` is not the state of an optimizer, the names do not fit its groups, or they are unknown.
    """
    if not {"state", "param_groups"} <= set(old):
        raise ValueError(
            f"the old state has the keys {listed(sorted(map(str, old)))}; expected an optimizer's state_dict(), with "
            "`state` and `param_groups`"
        )
    groups = old["param_groups"]
    carried = [group.get("names", group.get("param_names", _as_names(group["params"]))) for group in groups]
    chosen = names if names is not None else carried if all(carried) else _infer_names(groups, model)
    counts = [len(group["params"]) for group in groups]
    if [len(each) for each in chosen] != counts:
        raise ValueError(
            f"names are given for groups of {[len(each) for each in chosen]} parameters, and the old state has groups "
            f"of {counts}"
        )
    return {
        canonical_name(name): _entry(dict(old["state"].get(key, {})), group)
        for own, group in zip(chosen, groups)
        for name, key in zip(own, group["params"])
    }


def _as_names(params: Sequence[Any]) -> list[str] | None:
    """Return the names of a group in which names replace parameters, as in torch.distributed.checkpoint."""
    return list(params) if all(isinstance(each, str) for each in params) else None


def _infer_names(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> list[list[str]]:
    """Return the names in the order in which torch, or transformers' Trainer, groups the parameters of a model."""
    counts, named = [len(group["params"]) for group in groups], dict(model.named_parameters())
    candidates = [
        list(_original_names(model)),
        list(_original_names(model, frozen=True)),  # model.parameters() includes frozen parameters
        # The weights may have been split before the old optimizer was made.
        [canonical_name(name) for name, parameter in named.items() if parameter.requires_grad],
        [canonical_name(name) for name in named],
    ]
    for all_names in candidates:
        if counts == [len(all_names)]:
            return [all_names]
    of_trainer = len(counts) == 2 and is_installed("transformers")
    for all_names in candidates if of_trainer else ():
        from transformers import Trainer

        decayed = Trainer.get_decay_parameter_names(cast(Any, None), cast(Any, model))
        decays = {name_before_split(canonical_name(name)) for name in decayed}
        pair = [
            [name for name in all_names if (name_before_split(name) in decays) is wanted]
            for wanted in (True, False)
        ]
        if [len(each) for each in pair] == counts:
            return pair
    raise ValueError(
        f"the old groups carry no names, and have {counts} parameters where the model has {len(candidates[0])}: "
        "expected one group of all, or Trainer's two; give names=[[...], ...], the names in each group"
    )


def _original_names(model: nn.Module, *, frozen: bool = False) -> Iterator[str]:
    """Yield the names that ``named_parameters()`` gave before ``split_fused``, each parameter once.

    Args:
        model: the model, split or not.
        frozen: also yield parameters that are not trained.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix, split = canonical_name(f"{path}.") if path else "", split_state(module)
        if "parametrizations" in path.split("."):
            continue
        for leaf in split.order if split else module._parameters:
            own = module._parameters.get(leaf)
            if own is not None and (id(own) in seen or not (own.requires_grad or frozen)):
                continue
            if own is not None or (split and leaf in split.leaves):
                seen.add(id(own))
                yield f"{prefix}{leaf}"


def name_before_split(name: str) -> str:
    """Return the name of the fused weight that a part belongs to; any other name unchanged."""
    found = PART.fullmatch(name)
    return f"{found['before']}{found['leaf']}" if found else name


def listed(names: Sequence[str]) -> str:
    """Join the first names, and state how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
