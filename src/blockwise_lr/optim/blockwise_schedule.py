"""BlockwiseSchedule: a torch scheduler with a peak learning rate per block, built on the functions of curves.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from blockwise_lr.optim.curves import FloorMode, Shape, WarmupMode, WarmupStart, block_lr
from blockwise_lr.optim.load_hooks import attach
from blockwise_lr.optim.overwritten_lrs import register_schedule
from blockwise_lr.optim.saved_groups import OnChange, check_on_change, has_moving_ratios
from blockwise_lr.optim.set_lr import init_scale_of
from blockwise_lr.optim.warmup import plain_number, warmup_in_steps

# Arguments of block_lr, and keys of a saved schedule.
_SETTINGS = ("shape", "total_steps", "warmup_steps", "warmup", "warmup_start", "floor", "floor_mode")
_NOT_SAVED = ("optimizer", "on_change", "notes", "_groups_noted")


class BlockwiseSchedule(LRScheduler):
    """A learning-rate schedule for the groups of :func:`param_groups`.

    Create one with :func:`cosine_schedule` or :func:`wsd_schedule`.

    The schedule computes every learning rate from the step and from the group's ``initial_lr`` and ``lr_ratio``. It
    never uses the current ``lr``. The learning rates are therefore correct after a resume. After ``add_param_group``,
    or after other code has overwritten an ``lr``, they are correct from the next ``step()`` of the schedule. The ``lr``
    of an added group is its peak.

    The state of a schedule holds its progress and its settings. :meth:`load_state_dict` restores only the progress. The
    schedule keeps its own settings, and one warning names those that differ.

    While the schedule exists, it also checks what its optimizer loads. ``optimizer.load_state_dict`` compares the saved
    base learning rate and ratios with those of the current groups, then sets every learning rate to the schedule's
    value. The optimizer and the schedule can therefore be created and loaded in any order.

    For groups with ``decay="constant"``, the schedule updates ``weight_decay`` at every step. The product
    ``lr * weight_decay`` then equals that of a block at the base learning rate.
    """

    warmup_start: WarmupStart = "zero"  # the value for objects that an earlier version pickled
    on_change: OnChange = "error"
    notes: list[str] | None = None
    """Collects the reports of changes. None (default): each report is issued as a warning."""
    _groups_noted = False  # whether loading the optimizer has reported its changes

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        shape: Shape,
        warmup_steps: float,
        total_steps: int,
        floor: float,
        floor_mode: FloorMode = "shared",
        warmup: WarmupMode = "shared",
        warmup_start: WarmupStart = "above_zero",
        last_epoch: int = -1,
        on_change: OnChange = "error",
    ) -> None:
        check_on_change(on_change)
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(
                f"a schedule got a {type(optimizer).__name__}; expected an optimizer on groups of param_groups: "
                f"{shape}_schedule(optimizer, warmup_steps=..., total_steps=...)"
            )
        self.on_change = on_change
        self.shape = shape
        self.total_steps: int = plain_number(total_steps, "total_steps", "1000")
        self.warmup_steps = warmup_in_steps(warmup_steps, self.total_steps)
        self.floor: float = plain_number(floor, "floor", "3e-5")
        self.floor_mode = floor_mode
        self.warmup = warmup
        self.warmup_start = warmup_start
        for group in optimizer.param_groups:
            self._record_peaks(group)
            self._lr(group, 0)  # raise errors about an invalid schedule now, not in the middle of a run
        super().__init__(optimizer, int(last_epoch))
        attach(self)
        register_schedule(optimizer, self)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each group at the current step, in closed form."""
        lrs: list[float | torch.Tensor] = []
        for group in self.optimizer.param_groups:
            self._record_peaks(group)
            lrs.append(self._lr(group, self.last_epoch))
            if group.get("decay") == "constant":
                group["weight_decay"] = group["peak_weight_decay"] * self._decay_factor(
                    group, self.last_epoch
                )
        return lrs

    def state_dict(self) -> dict[str, Any]:
        """Return the progress and the settings of the schedule as plain values."""
        state = {key: value for key, value in super().state_dict().items() if key not in _NOT_SAVED}
        # AutoRatios may have moved the peaks. LambdaLR, with which a plain Trainer resumes, requires `lr_lambdas`.
        peaks = [float(group["initial_lr"]) for group in self.optimizer.param_groups]
        return {**state, "base_lrs": peaks, "lr_lambdas": []}

    def settings(self) -> dict[str, Any]:
        """Return the settings that the schedule was created with."""
        return {key: getattr(self, key) for key in _SETTINGS}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the step of a saved schedule, with the settings of this schedule.

        Every learning rate is set to the value of this schedule at that step. One warning names all settings that
        differ.

        Args:
            state_dict: from :meth:`state_dict`. The state of any other torch scheduler also works; only its
                ``last_epoch`` is used.

        Raises:
            ValueError: the state has no ``last_epoch``; ``total_steps`` has changed and is below the saved step; or
                the schedule is invalid for a block, because the ratios or ``total_steps`` have changed.
        """
        step = state_dict.get("last_epoch")
        if not isinstance(step, int):
            raise ValueError(
                f"the state of a schedule has last_epoch={step!r}; expected the number of steps done: load the "
                "state_dict() of a torch schedule"
            )
        if step > self.total_steps != state_dict.get("total_steps"):
            raise ValueError(
                f"{step} steps are done, and the schedule was made for total_steps={self.total_steps}: make it for "
                "more steps, or begin a new run"
            )
        for group in self.optimizer.param_groups:
            self._record_peaks(group)
            self._lr(group, step)
        changes = self._changes(state_dict, step)
        own = self.owns_lrs() or self.owns_lrs(state_dict.get("_last_lr"))
        kept = {*_SETTINGS, *_NOT_SAVED, "base_lrs"}
        self.__dict__.update({k: v for k, v in state_dict.items() if k in self.__dict__ and k not in kept})
        if own:
            self.set_lrs()
        if changes:
            self.note(
                f"the schedule goes on at step {step} with other settings than it was saved with: {'; '.join(changes)}"
            )

    def note(self, text: str) -> None:
        """Issue a warning with this text, or append the text to :attr:`notes` if that is a list."""
        if self.notes is None:
            warnings.warn(text, stacklevel=3)
        else:
            self.notes.append(text)

    def note_group_changes(self, text: str) -> None:
        """Report a change in the optimizer's groups, and remember that it was reported."""
        self._groups_noted = True
        self.note(text)

    def resume_at(self, step: int) -> None:
        """Continue after `step` updates: set every learning rate to the value of that step."""
        self.last_epoch, self._step_count = step, step + 1
        self.set_lrs()

    def set_lrs(self) -> None:
        """Set the learning rate of every group to the value of the current step. Tensors are changed in place."""
        groups = self.optimizer.param_groups
        for group, lr in zip(groups, self.get_lr()):
            if isinstance(group["lr"], torch.Tensor):  # a compiled step may hold a reference to this tensor
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = [
            lr.clone() if isinstance(lr := group["lr"], torch.Tensor) else lr for group in groups
        ]

    def owns_lrs(self, last: Sequence[float | torch.Tensor] | None = None) -> bool:
        """Return whether the learning rates of the groups are those that this schedule set last.

        Inside torch's SequentialLR another scheduler can be active. This schedule must not overwrite its learning
        rates.

        Args:
            last: the learning rates to compare with. Default: those that this schedule set last.
        """
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        last = self._last_lr if last is None else last
        return all(math.isclose(float(lr), float(own), rel_tol=1e-6) for lr, own in zip(lrs, last))

    def _changes(self, state: Mapping[str, Any], step: int) -> list[str]:
        """Describe each setting that differs from the saved schedule, such as "total_steps 20 -> 60"."""
        if "total_steps" not in state:  # saved by another scheduler
            return []
        saved = {"warmup_start": "zero", **state}  # earlier versions always started at zero
        changed = [key for key in _SETTINGS if key in saved and saved[key] != getattr(self, key)]
        # The start of a finished warm-up has no effect.
        if step >= max(saved["warmup_steps"], self.warmup_steps):
            changed = [key for key in changed if key != "warmup_start"]
        return [f"{key} {saved[key]} -> {getattr(self, key)}" for key in changed] + self._moved_peaks(saved)

    def _moved_peaks(self, state: Mapping[str, Any]) -> list[str]:
        """Describe the peaks that changed, unless loading the optimizer has already reported them."""
        groups, saved = self.optimizer.param_groups, state.get("base_lrs") or []
        if self._groups_noted or has_moving_ratios(groups) or len(saved) != len(groups):
            return []
        return [
            f"initial_lr of {group.get('block', 'a group')} {float(old):g} -> {float(group['initial_lr']):g}"
            for old, group in zip(saved, groups)
            if not math.isclose(float(old), float(group["initial_lr"]), rel_tol=1e-6)
        ]

    @property
    def largest_ratio(self) -> float:
        """The largest ratio whose warm-up fits into the run: infinite unless ``warmup="equal_slope"``."""
        if self.warmup != "equal_slope" or self.warmup_steps <= 0:
            return math.inf
        room = self.total_steps / 3 if self.shape == "wsd" else self.total_steps
        return room / self.warmup_steps * (1 - 1e-9)  # leaves room for the rounding of a ratio

    @property
    def begins_at_zero(self) -> bool:
        """Whether the first update has learning rate 0."""
        return self.warmup_start == "zero" and self.warmup_steps > 0

    @staticmethod
    def _record_peaks(group: dict[str, Any]) -> None:
        """Store the peak learning rate, and the weight decay at the peak, in a group that lacks them."""
        group.setdefault("initial_lr", float(group["lr"]))
        if group.get("decay") == "constant":
            group.setdefault("peak_weight_decay", group["weight_decay"])

    def _lr(self, group: dict[str, Any], step: int, ratio: float | None = None) -> float:
        """Return the learning rate of a group at `step`, optionally as if the group had another `ratio`.

        The factor of ``relative_to="init"`` multiplies the whole curve: its floor too, and not the length of its
        warm-up. With another `ratio` there is no factor.
        """
        peak, own_ratio = float(group["initial_lr"]), float(group.get("lr_ratio", 1.0))
        factor = init_scale_of(group)
        if ratio is None:
            peak, ratio = peak / factor, own_ratio / factor
        else:
            peak, factor = ratio * peak / own_ratio, 1.0
        # The step can be -1: SequentialLR undoes the first step of the schedules that start later.
        return factor * block_lr(max(step, 0), peak=peak, ratio=ratio, **self.settings())

    def _decay_factor(self, group: dict[str, Any], step: int) -> float:
        """Return the factor by which ``decay="constant"`` multiplies the peak weight decay of a group at `step`.

        Every block then shrinks per step as a block at the base learning rate does:

            lr_b(t) * weight_decay_b(t) = lr_base(t) * weight_decay

        At the peak, weight_decay_b is weight_decay / ratio.
        """
        own, base = self._lr(group, step), self._lr(group, step, ratio=1.0)
        return float(group["lr_ratio"]) * base / own if own > 0 else 1.0
