"""A Trainer's optimizer loads a checkpoint of other groups: the moments are carried over by parameter name."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer

from blockwise_lr.optim.adopt import adopt_state
from blockwise_lr.optim.saved_groups import OnChange, moves, other_parameters


def carry_over(optimizer: Optimizer, model: nn.Module, on_change: OnChange, *, ratios_move: bool) -> None:
    """Let ``optimizer.load_state_dict`` take a state of other groups.

    A plain Trainer saves two groups without names. Their moments are carried over, and the settings of the groups by
    block hold. Other groups by block are an error, or with "use_new" are carried over, too.

    Args:
        optimizer: on groups of :func:`blockwise_lr.param_groups`. The hook lives as long as the optimizer.
        model: the model that it trains.
        on_change: as for :class:`BlockwiseTrainer`.
        ratios_move: whether AutoRatios moves the ratios.
    """
    model_ref = weakref.ref(model)

    def before_loading(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        saved, groups = state.get("param_groups", []), optimizer.param_groups
        target = model_ref()
        if target is None:
            return None
        foreign = bool(saved) and not any("names" in group for group in saved)
        problem = None if foreign else other_parameters(saved, groups)
        if not ratios_move and moves(saved):
            if on_change == "error":
                raise ValueError(
                    "the checkpoint's ratios were moved by AutoRatios, and the ratios here are fixed: give ratios="
                    'AutoRule(...) as it was, or go on with the fixed ones by on_change="use_new"'
                )
            state = {**state, "param_groups": [_without_auto(group) for group in saved]}
        if problem and on_change == "error":
            raise ValueError(
                f'{problem}: make the groups as they were, or go on with the new ones by on_change="use_new"'
            )
        if not foreign and not problem:
            return state
        adopt_state(state, target, optimizer)
        return optimizer.state_dict()  # which loading puts where it is

    optimizer.register_load_state_dict_pre_hook(before_loading)


def _without_auto(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if not key.startswith("auto_")}
