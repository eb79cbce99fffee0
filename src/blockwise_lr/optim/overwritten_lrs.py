"""Warn if other code has set the learning rates of all groups to one number.

Many training loops set the learning rate by ``for group in optimizer.param_groups: group["lr"] = lr``. This erases the
ratios without any other sign. Only the optimizer's own step sees the learning rates that an update uses, but
``param_groups`` returns before the optimizer exists. :func:`watch_next_optimizer` therefore registers a global torch
hook on optimizer steps. The first step of an optimizer on such groups registers a hook on that optimizer alone; the
global hook is then removed.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

_EQUAL = 1e-6  # relative difference below which two learning rates count as equal
# Equal learning rates cause a warning only if their spread at the previous step was at least the spread of the ratios
# to this power. A smaller spread means that a decay has brought the learning rates together gradually.
_SUDDEN = 0.75

# One parameter of each set of groups that no optimizer has stepped yet.
_waiting: list[weakref.ref[Tensor]] = []
_global_hook: list[RemovableHandle] = []  # at most one
_watched: weakref.WeakKeyDictionary[Optimizer, _LrWatch] = weakref.WeakKeyDictionary()
_schedules: weakref.WeakKeyDictionary[Optimizer, weakref.ref[LRScheduler]] = weakref.WeakKeyDictionary()


def watch_next_optimizer(groups: Sequence[Mapping[str, Any]]) -> None:
    """Watch the optimizer that will be created on these groups, starting with its first step.

    Args:
        groups: from :func:`blockwise_lr.param_groups`. If all ratios are equal, nothing is watched.
    """
    if len({group["lr_ratio"] for group in groups}) < 2:
        return
    first = groups[0]["params"][0]
    if all(reference() is not first for reference in _waiting):
        _waiting.append(weakref.ref(first))
    if not _global_hook:
        _global_hook.append(register_optimizer_step_pre_hook(_before_any_step))


def register_schedule(optimizer: Any, schedule: LRScheduler) -> None:
    """Record the schedule of an optimizer, so that its own learning rates cause no warning.

    A schedule of this library may bring all blocks to one learning rate on purpose.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper: hooks get the optimizer inside
    if isinstance(inner, Optimizer):
        _schedules[inner] = weakref.ref(schedule)


def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Global hook before every optimizer step, active until the optimizers of all groups have been seen."""
    if torch.compiler.is_compiling():
        return
    members = {id(p) for group in optimizer.param_groups if "lr_ratio" in group for p in group["params"]}
    waiting = [(reference, reference()) for reference in _waiting]
    _waiting[:] = [reference for reference, p in waiting if p is not None and id(p) not in members]
    if members and optimizer not in _watched:
        watch = _watched[optimizer] = _LrWatch()
        optimizer.register_step_post_hook(watch.after_step)  # the hook lives as long as the optimizer


class _LrWatch:
    """Checks the learning rates of one optimizer after each step."""

    def __init__(self) -> None:
        self._done = False
        self._steps = 0
        self._spread: float | None = None  # largest over smallest learning rate at the previous step

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Hook after each step of the optimizer, before a schedule sets the next learning rates."""
        if torch.compiler.is_compiling():
            return
        if not _waiting and _global_hook:
            _global_hook.pop().remove()  # not in _before_any_step, where torch iterates over the global hooks
        if self._done:
            return
        self._steps += 1
        groups = [group for group in optimizer.param_groups if "lr_ratio" in group]
        if not groups or not self._readable(groups):
            return
        rates = [float(group["lr"]) for group in groups]
        low, high = min(rates), max(rates)
        if high <= 0:  # a warm-up that starts at 0
            return
        before, self._spread = self._spread, high / low if low > 0 else None
        if high - low > _EQUAL * high:
            return
        ratios = [group["lr_ratio"] for group in groups]
        nominal = max(ratios) / min(ratios)
        if nominal <= 1 + _EQUAL or (before is not None and before < nominal**_SUDDEN):
            return
        if not self._set_by_schedule(optimizer):
            self._done = True
            _warn(groups, high)

    def _readable(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the learning rates can be read without a host sync at every step."""
        if not any(isinstance(lr := group["lr"], Tensor) and lr.device.type != "cpu" for group in groups):
            return True
        rarely = self._steps & (self._steps - 1) == 0  # at steps 1, 2, 4, 8, ...
        return rarely and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    @staticmethod
    def _set_by_schedule(optimizer: Optimizer) -> bool:
        """Return whether the learning rates are those that the optimizer's schedule set."""
        schedule = reference() if (reference := _schedules.get(optimizer)) else None
        return schedule is not None and all(
            float(group["lr"]) == float(lr)
            for group, lr in zip(optimizer.param_groups, schedule.get_last_lr())
        )


def _warn(groups: Sequence[Mapping[str, Any]], rate: float) -> None:
    ratios = {group.get("block", "a group"): group["lr_ratio"] for group in groups}
    warnings.warn(
        f"all {len(groups)} parameter groups are at one learning rate, {rate:g}, though their ratios differ "
        f"({', '.join(f'{block} {ratio:g}' for block, ratio in ratios.items())}): something has overwritten the rate "
        "of every group, so the blocks no longer have rates of their own. Where your loop assigns the rate, write "
        "set_lr(optimizer, lr) instead; where a torch schedule sets it, wrap the schedule when it is made, "
        "scheduler = scale_by_block(scheduler). Both: from blockwise_lr import scale_by_block, set_lr",
        UserWarning,
        stacklevel=_stacklevel(),
    )


def _stacklevel() -> int:
    """Return the stack level of the first frame outside the libraries.

    accelerate silences warnings that seem to come from torch's schedulers.
    """
    level, frame = 1, sys._getframe(1)
    libraries = ("torch", "accelerate", "transformers", __name__.partition(".")[0])
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in libraries:
        level, frame = level + 1, frame.f_back
    return level
