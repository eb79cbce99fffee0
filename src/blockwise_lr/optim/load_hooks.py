"""Hooks that check what an optimizer loads: those of its schedule, and those of an optimizer without one."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from blockwise_lr.optim.saved_groups import OnChange, reconcile

if TYPE_CHECKING:
    from blockwise_lr.optim.blockwise_schedule import BlockwiseSchedule

_HOOKS: weakref.WeakKeyDictionary[Optimizer, _LoadHooks] = weakref.WeakKeyDictionary()


class _LoadHooks:
    """Two hooks on ``optimizer.load_state_dict`` that hold only a weak reference to the schedule.

    The first compares the saved settings with those of the groups before the state is loaded. The second sets the
    learning rates to those of the schedule afterwards.
    """

    def __init__(self, schedule: BlockwiseSchedule, optimizer: Optimizer) -> None:
        self._schedule = weakref.ref(schedule)
        self._owned = False
        self._handles = (
            optimizer.register_load_state_dict_pre_hook(self._before),
            optimizer.register_load_state_dict_post_hook(self._after),
        )

    @property
    def active(self) -> bool:
        """Whether the schedule still exists."""
        return self._schedule() is not None

    def remove(self) -> None:
        """Remove both hooks."""
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Return the state to load, after comparing its settings with those of the groups."""
        schedule = self._schedule()
        if schedule is None:
            return None
        self._owned = schedule.owns_lrs()
        return dict(
            reconcile(state_dict, optimizer.param_groups, schedule.on_change, schedule.note_group_changes)
        )

    def _after(self, optimizer: Optimizer) -> None:
        """Set the learning rates to those of the schedule, if it had set them before the load."""
        schedule = self._schedule()
        if schedule is not None and self._owned:
            schedule.set_lrs()


def is_attached(optimizer: Optimizer) -> bool:
    """Return whether a schedule checks what this optimizer loads."""
    hooks = _HOOKS.get(optimizer)
    return hooks is not None and hooks.active


def attach(schedule: BlockwiseSchedule) -> None:
    """Attach the hooks of a schedule to its optimizer, in place of those of an earlier schedule."""
    optimizer: Any = schedule.optimizer
    # Unwrap wrappers such as that of accelerate.
    while not hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None:
            return
    if (earlier := _HOOKS.pop(optimizer, None)) is not None:
        earlier.remove()
    hooks = _HOOKS[optimizer] = _LoadHooks(schedule, optimizer)
    weakref.finalize(schedule, hooks.remove).atexit = False


def compare_when_loading(
    optimizer: Optimizer, on_change: OnChange = "error", *, remedy: str = 'by on_change="use_new"'
) -> None:
    """Make ``optimizer.load_state_dict`` compare the saved settings with those of the groups, as a schedule does.

    While a schedule of this library is attached, the schedule compares them instead.

    Args:
        optimizer: an optimizer on groups of :func:`blockwise_lr.param_groups`.
        on_change: as in :func:`blockwise_lr.optim.load_optimizer_state`.
        remedy: how the user continues with the new settings, for the message.
    """

    def before_loading(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        if is_attached(optimizer):
            return None
        try:
            return dict(reconcile(state, optimizer.param_groups, on_change))
        except ValueError as error:
            raise ValueError(str(error).replace('by on_change="use_new"', remedy)) from None

    optimizer.register_load_state_dict_pre_hook(before_loading)
