"""The schedules of transformers' Trainer (``lr_scheduler_type``), applied to blockwise parameter groups."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import SchedulerType

from blockwise_lr.optim.blockwise_schedule import BlockwiseSchedule
from blockwise_lr.optim.curves import Shape, WarmupMode
from blockwise_lr.optim.saved_groups import OnChange
from blockwise_lr.optim.set_lr import all_groups, ratio_of, restore_peak_decay

ScheduleName = Literal["cosine", "wsd", "trainer"]

_LOGGER = logging.getLogger(__name__)
_TRAINER_NAMES = {"cosine": "cosine", "wsd": "warmup_stable_decay"}  # transformers' names for our schedules
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
# get_scheduler silently ignores keyword arguments for these.
_NO_KWARGS = ("constant", "constant_with_warmup")
_GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
_logged: set[str] = set()  # messages that were logged already; each is logged once


def choose_schedule(
    schedule: ScheduleName | None,
    args: TrainingArguments,
    *,
    floor: float | None = None,
    warmup: WarmupMode = "shared",
) -> ScheduleName:
    """Choose between this library's schedules and the one that TrainingArguments names.

    Args:
        schedule: BlockwiseTrainer's argument. None: "cosine" if `args` have their default schedule, else "trainer".
        args: the arguments whose ``lr_scheduler_type`` and ``lr_scheduler_kwargs`` are read.
        floor, warmup: BlockwiseTrainer's arguments, which only this library's schedules use.

    Returns:
        "cosine" or "wsd" for this library's schedules, "trainer" for the one that `args` name.

    Raises:
        ValueError: two settings contradict each other, a setting would have no effect, or the schedule of
            transformers cannot be scaled per block.
    """
    kind = SchedulerType(args.lr_scheduler_type)
    kwargs = cast("Mapping[str, Any]", args.lr_scheduler_kwargs or {})
    if schedule not in (None, "cosine", "wsd", "trainer"):
        raise ValueError(f'schedule is {schedule!r}; expected "cosine", "wsd", "trainer" or None')
    default = _default_of(args)  # the schedule of `args` if the user set none
    untouched = kind is default and not kwargs
    if schedule == "trainer" or (schedule is None and not untouched):
        _check_type(kind, kwargs)
        for name, unused in (("floor", floor is not None), ("warmup", warmup != "shared")):
            if unused:
                given = floor if name == "floor" else warmup
                raise ValueError(
                    f"{name}={given!r} applies only to this library's schedules, and lr_scheduler_type={kind.value!r} "
                    f"is one of transformers': leave out {name}, or lr_scheduler_type"
                )
        return "trainer"
    ours: Literal["cosine", "wsd"] = "wsd" if schedule == "wsd" else "cosine"
    if kind is not default and kind.value != _TRAINER_NAMES[ours]:
        raise ValueError(
            f"schedule={ours!r} and lr_scheduler_type={kind.value!r} ask for two different schedules: leave out one "
            f'of them (schedule="trainer" uses lr_scheduler_type)'
        )
    if kwargs:
        raise ValueError(
            f"lr_scheduler_kwargs={dict(kwargs)!r} would not be used with schedule={ours!r}, one of this library's: "
            f'leave them out, or set schedule="trainer" for transformers\' {kind.value}'
        )
    if schedule is None and "default" not in _logged:
        _logged.add("default")
        _LOGGER.warning(
            "BlockwiseTrainer uses its own schedule, cosine decay to a floor, because lr_scheduler_type has its "
            'default, %r. Set schedule="trainer" to use lr_scheduler_type, or schedule="cosine" to stop this message',
            kind.value,
        )
    return ours


class TrainerSchedule(BlockwiseSchedule):
    """A schedule of transformers with a peak learning rate per block.

        lr_b(t) = ratio_b * base * f(t)

    f is transformers' own function of the step. A block of ratio 1 therefore has exactly the learning rates that a
    plain Trainer gives all parameters, to the bit. The ratios stay constant to the end.

    Args:
        optimizer: an optimizer on groups of :func:`blockwise_lr.param_groups`.
        args: Trainer's arguments.
        total_steps: number of optimizer steps in the run.
        on_change: as in :func:`blockwise_lr.cosine_schedule`.

    Raises:
        ValueError: ``lr_scheduler_type`` or ``lr_scheduler_kwargs`` cannot be used.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        args: TrainingArguments,
        total_steps: int,
        *,
        on_change: OnChange = "error",
    ) -> None:
        kind = SchedulerType(args.lr_scheduler_type)
        kwargs = cast("dict[str, Any]", dict(cast("Mapping[str, Any]", args.lr_scheduler_kwargs or {})))
        warmup_steps = args.get_warmup_steps(total_steps)
        self._factor = _factor(kind, kwargs, args.learning_rate, warmup_steps, total_steps)
        self._kwargs = kwargs
        super().__init__(
            optimizer,
            # The prefix tells transformers' "cosine" apart from this library's.
            shape=cast("Shape", f"trainer:{kind.value}"),
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            floor=0.0,
            floor_mode="proportional",
            warmup_start="zero",
            on_change=on_change,
        )

    def _lr(self, group: dict[str, Any], step: int, ratio: float | None = None) -> float:
        peak = float(group["initial_lr"])
        if ratio is not None:
            peak = ratio * peak / ratio_of(group)
        return peak * self._factor(max(step, 0))

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each group at the current step."""
        lrs: list[float | torch.Tensor] = []
        for group in self.optimizer.param_groups:
            self._record_peaks(group)
            restore_peak_decay(group)
            lrs.append(self._lr(group, self.last_epoch))
        return lrs

    def state_dict(self) -> dict[str, Any]:
        """Return the progress and the settings to compare on a resume; plain Trainer's schedules can load it too."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": self._last_lr,
            **self.settings(),
            "base_lrs": [float(group["initial_lr"]) for group in self.optimizer.param_groups],
            "lr_lambdas": [],  # LambdaLR requires this key
        }

    def settings(self) -> dict[str, Any]:
        """Return the settings that a resume compares."""
        return {
            "shape": self.shape,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "lr_scheduler_kwargs": dict(self._kwargs),
        }

    @property
    def begins_at_zero(self) -> bool:
        """Whether the learning rate of the first update is 0."""
        return self._factor(0) == 0

    def _changes(self, state: Mapping[str, Any], step: int) -> list[str]:
        if "total_steps" not in state:  # saved by a plain Trainer
            return []
        saved = {"lr_scheduler_kwargs": {}, **state}
        changed = [key for key, value in self.settings().items() if key in saved and saved[key] != value]
        return [f"{key} {saved[key]} -> {self.settings()[key]}" for key in changed] + self._moved_peaks(saved)


def base_lr(optimizer: Any, schedule: Any) -> float:
    """Return the base learning rate at the schedule's step: that of a block with ratio 1, even if no block has it.

    Args:
        optimizer: an optimizer on groups of :func:`blockwise_lr.param_groups`, wrapped or not.
        schedule: its schedule, of this library or any other.
    """
    groups = all_groups(optimizer)
    if isinstance(schedule, BlockwiseSchedule):
        # With a shared floor, a block's learning rate divided by its ratio is not the base learning rate.
        return schedule._lr(groups[0], schedule.last_epoch, ratio=1.0)
    group = next((group for group in groups if ratio_of(group) == 1), groups[0])
    return float(group["lr"]) / ratio_of(group)


def _factor(
    kind: SchedulerType, kwargs: Mapping[str, Any], base: float, warmup_steps: int, total_steps: int
) -> Callable[[int], float]:
    """Return transformers' function of the step, taken from a schedule of a dummy optimizer.

    The dummy has one group at the base learning rate, which some of these functions read.
    """
    _check_type(kind, kwargs)
    dummy = torch.optim.SGD([torch.zeros(1)], lr=base)
    built = get_scheduler(kind, dummy, warmup_steps, total_steps, dict(kwargs))
    if not isinstance(built, LambdaLR):
        raise ValueError(_unmapped(kind))
    if kind is SchedulerType.CONSTANT and warmup_steps and "constant" not in _logged:
        _logged.add("constant")
        _LOGGER.warning(
            "warmup_steps=%d has no effect, because lr_scheduler_type='constant' has no warm-up (in plain Trainer "
            "neither): 'constant_with_warmup' has one",
            warmup_steps,
        )
    return built.lr_lambdas[0]


def _default_of(args: TrainingArguments) -> SchedulerType:
    """Return the default schedule of the arguments' class: "linear" in TrainingArguments; subclasses may differ."""
    field = next(field for field in dataclasses.fields(args) if field.name == "lr_scheduler_type")
    return SchedulerType(field.default)


def _check_type(kind: SchedulerType, kwargs: Mapping[str, Any]) -> None:
    if kind.value in _BY_METRIC:
        raise ValueError(_unmapped(kind))
    takes = inspect.signature(cast("Callable[..., Any]", TYPE_TO_SCHEDULER_FUNCTION[kind])).parameters
    known = [name for name in takes if name not in _GIVEN] if kind.value not in _NO_KWARGS else []
    if unknown := [name for name in kwargs if name not in known]:
        raise ValueError(
            f"lr_scheduler_kwargs has {unknown[0]!r}, which lr_scheduler_type={kind.value!r} does not use; "
            f"it takes {', '.join(known) or 'none'}"
        )
    needed = [name for name in known if takes[name].default is inspect.Parameter.empty and name not in kwargs]
    if needed:
        raise ValueError(
            f"lr_scheduler_type={kind.value!r} needs {needed[0]}: "
            f'lr_scheduler_kwargs={{"{needed[0]}": ...}}; it takes {", ".join(known)}'
        )


def _unmapped(kind: SchedulerType) -> str:
    mapped = [each.value for each in TYPE_TO_SCHEDULER_FUNCTION if each.value not in _BY_METRIC]
    return (
        f"lr_scheduler_type={kind.value!r} is no function of the step, so BlockwiseTrainer cannot scale it for each "
        f"block: choose one of {', '.join(mapped)}, or give transformers.Trainer your own pair, "
        "optimizers=(optimizer, scale_by_block(ReduceLROnPlateau(optimizer)))"
    )
