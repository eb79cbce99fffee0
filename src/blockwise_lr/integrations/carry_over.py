"""A Trainer's optimizer loads a checkpoint of other groups: the moments are carried over by parameter name."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from blockwise_lr.optim.load_hooks import is_attached
from blockwise_lr.optim.saved_groups import OnChange, describe_other_parameters, has_moving_ratios, reconcile
from blockwise_lr.optimizers.state_transfer import adopt_state


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
        problem = None if foreign else describe_other_parameters(saved, groups)
        if not ratios_move and has_moving_ratios(saved):
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
        if not foreign and not problem:  # a schedule of this library compares the settings itself
            return state if is_attached(optimizer) else dict(reconcile(state, groups, on_change))
        adopt_state(state, target, optimizer)
        return optimizer.state_dict()  # which loading puts where it is

    optimizer.register_load_state_dict_pre_hook(before_loading)


def take_new_peaks(scheduler: LambdaLR) -> None:
    """After loading: the peaks are those of the optimizer's groups, and not those that were saved.

    Args:
        scheduler: one of transformers' own. A schedule of this library needs no such thing.
    """
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects get_lr to be called by step() alone
        lrs = scheduler.get_lr()
    for group, lr in zip(groups, lrs):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    scheduler._last_lr = list(lrs)


def _without_auto(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if not key.startswith("auto_")}
