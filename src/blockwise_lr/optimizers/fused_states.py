"""Find the old state of a parameter in a model whose fused weights were split or merged since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockwise_lr.blocks.model_facts import ModelFacts
from blockwise_lr.blocks.weight_parts import FusedWeight
from blockwise_lr.optimizers.adam_mini_views import spread
from blockwise_lr.optimizers.named_state import PART, Entry, State, listed, name_before_split

_UNSPLITTABLE = object()


def fused_layouts(model: nn.Module) -> dict[str, FusedWeight]:
    """Return the layout of each fused weight of the model by its original name, whether or not it is split now."""
    found: dict[str, FusedWeight] = {}
    facts = ModelFacts(model)
    for (path, leaf), projection in facts.projections.items():
        if projection.fused and projection.repeats is not None:
            parts, sizes = zip(*projection.parts)
            found[f"{path}.{leaf}" if path else leaf] = FusedWeight(
                parts, sizes, projection.dim, projection.repeats
            )
    return found


def source_of(
    name: str, old_states: Mapping[str, Entry], fused: Mapping[str, FusedWeight], changed: str
) -> tuple[Entry, list[str]]:
    """Return the old state of a parameter, split or fused as the parameter is now.

    Returns:
        The state, and the names of the old parameters that it comes from.
    """
    if name in old_states:
        return old_states[name], [name]
    part, layout = PART.fullmatch(name), fused.get(name_before_split(name))
    if part and layout and name_before_split(name) in old_states:
        whole = old_states[name_before_split(name)]
        moments = {
            key: _split_moment(key, value, layout, int(part["index"])) for key, value in whole.state.items()
        }
        return whole._replace(
            state={key: value for key, value in moments.items() if value is not _UNSPLITTABLE}
        ), [name_before_split(name)]
    if layout:
        path, _, leaf = name.rpartition(".")
        prefix = f"{path}.parametrizations" if path else "parametrizations"
        names = [f"{prefix}.{leaf}.original{i}" for i in range(len(layout.sizes))]
        entries = [old_states[each] for each in names if each in old_states]
        if len(entries) == len(names) and len({bool(entry.state) for entry in entries}) == 1:
            return entries[0]._replace(state=_join_parts([each.state for each in entries], layout)), names
    if changed == "adopt":
        return Entry({}, None, {}), []
    raise ValueError(
        f"the old state has nothing for {name}; it has {listed(sorted(old_states))}: load the state that was saved "
        f"with this model; if {name} was frozen in the old run, "
        'adopt_state(..., changed="adopt") starts it without state'
    )


def _split_moment(key: str, value: Any, layout: FusedWeight, index: int) -> Any:
    """Return one part's share of a moment of a fused weight; _UNSPLITTABLE if the moment has no such shares."""
    if isinstance(value, (list, tuple)):  # SOAP's matrices belong to the whole weight
        return _UNSPLITTABLE
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape[layout.dim] == 1 != sum(layout.sizes):  # one value for all outputs, as in Adafactor
        return value
    if value.shape[layout.dim] != sum(layout.sizes):
        raise ValueError(
            f"a moment of shape {tuple(value.shape)} cannot be split into {layout.sizes}: expected one of the fused "
            "weight's shape"
        )
    return layout.right_inverse(value)[index]


def _join_parts(states: Sequence[State], layout: FusedWeight) -> State:
    """Return the state of a fused weight from the states of its parts."""
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
    """Return the shape in which each output of a part has its own value. Dimensions of inputs are unchanged."""
    return torch.Size(size if d == dim else n for d, n in enumerate(value.shape))
