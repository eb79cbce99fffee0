"""Resume a Trainer from a checkpoint whose optimizer had different parameter groups."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from blockwise_lr.optim.load_hooks import is_attached
from blockwise_lr.optim.saved_groups import (
    OnChange,
    describe_other_parameters,
    has_moving_ratios,
    reconcile,
    without_moving_state,
)
from blockwise_lr.optimizers.state_transfer import adopt_state


def carry_over_moments(
    optimizer: Optimizer, model: nn.Module, on_change: OnChange, *, ratios_move: bool
) -> None:
    """Let ``optimizer.load_state_dict`` accept a state that was saved with different parameter groups.

    A plain Trainer saves two groups without parameter names. The moments in such a state are carried over by parameter
    name, and the optimizer keeps the settings of its own groups. A state of different blockwise groups is an error
    when it is loaded, unless `on_change` is "use_new"; then its moments are carried over as well.

    Args:
        optimizer: an optimizer on groups of :func:`blockwise_lr.param_groups`. The hook is registered on it for good.
        model: the model that it trains.
        on_change: "error" or "use_new", as for :class:`BlockwiseTrainer`.
        ratios_move: whether AutoRatios changes the ratios during the run.
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
                    "the checkpoint's ratios were moved by AutoRatios, and the ratios here are fixed: give the "
                    'same ratios=AutoRule(...) again, or keep the fixed ones with on_change="use_new"'
                )
            state = {**state, "param_groups": [without_moving_state(group) for group in saved]}
        if problem and on_change == "error":
            raise ValueError(
                f'{problem}: make the groups as they were, or go on with the new ones by on_change="use_new"'
            )
        if not foreign and not problem:  # an attached schedule compares the settings itself
            return state if is_attached(optimizer) else dict(reconcile(state, groups, on_change))
        adopt_state(state, target, optimizer)
        return optimizer.state_dict()  # loading this state writes the carried-over values back

    optimizer.register_load_state_dict_pre_hook(before_loading)


def use_optimizer_peaks(scheduler: LambdaLR) -> None:
    """Replace the peak learning rates that a scheduler has loaded by those of the optimizer's groups.

    Call this after loading a checkpoint.

    Args:
        scheduler: a scheduler of transformers. The schedules of this library do not need this step.
    """
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of calls to get_lr outside step()
        lrs = scheduler.get_lr()
    for group, lr in zip(groups, lrs):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    scheduler._last_lr = list(lrs)
