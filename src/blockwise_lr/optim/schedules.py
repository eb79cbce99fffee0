"""torch schedulers with a peak per block, on the pure functions of curves.py."""

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
from blockwise_lr.optim.warmup import warmup_in_steps

_SETTINGS = ("shape", "total_steps", "warmup_steps", "warmup", "warmup_start", "floor", "floor_mode")
_NOT_SAVED = ("optimizer", "on_change", "notes", "_groups_noted")


class BlockwiseSchedule(LRScheduler):
    """A schedule for the groups of :func:`param_groups`; made by :func:`cosine_schedule` and :func:`wsd_schedule`.

    Every learning rate is computed from the step and the group's own ``initial_lr`` and ``lr_ratio``, never
    from the current ``lr``. So it is right after a resume, and, from the next ``step()`` of the schedule on, after
    ``add_param_group`` (the new group's ``lr`` is its peak) and after something else has overwritten an ``lr``.

    A schedule's state holds its progress and its settings. :meth:`load_state_dict` takes the progress alone: the
    settings stay those that the schedule was made with, and one warning names what has changed. The same holds for the
    optimizer: while the schedule exists, ``optimizer.load_state_dict`` compares the saved base learning rate and ratios
    with those that the groups were made with, and sets every learning rate to the schedule's. So optimizer and schedule
    may be made and loaded in any order.

    Groups with ``decay="constant"`` have their ``weight_decay`` kept so that ``lr * weight_decay`` is the base
    learning rate's at every step.
    """

    warmup_start: WarmupStart = "zero"  # of an object that an earlier version pickled
    on_change: OnChange = "error"
    notes: list[str] | None = None
    """Where changes are noted in the place of a warning; None: they are warned of."""
    _groups_noted = False  # whether loading the optimizer has named its changes

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
        self.on_change = on_change
        self.shape = shape
        self.warmup_steps = warmup_in_steps(warmup_steps, total_steps)
        self.total_steps = total_steps
        self.floor = floor
        self.floor_mode = floor_mode
        self.warmup = warmup
        self.warmup_start = warmup_start
        for group in optimizer.param_groups:
            self._record_peaks(group)
            self._lr(group, 0)  # refuse an impossible schedule now and not in the middle of a run
        super().__init__(optimizer, last_epoch)
        attach(self)
        register_schedule(optimizer, self)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Learning rate of each group at the current step, in closed form."""
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
        """The schedule's progress and settings, as plain values."""
        state = {key: value for key, value in super().state_dict().items() if key not in _NOT_SAVED}
        # Peaks as they are now. LambdaLR, which a plain Trainer resumes with, asks for `lr_lambdas`.
        peaks = [float(group["initial_lr"]) for group in self.optimizer.param_groups]
        return {**state, "base_lrs": peaks, "lr_lambdas": []}

    def settings(self) -> dict[str, Any]:
        """The settings that the schedule was made with."""
        return {key: getattr(self, key) for key in _SETTINGS}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on at the step of a saved schedule, with the settings that this one was made with.

        Every learning rate is set to this schedule's at that step. One warning names the settings that have changed.

        Args:
            state_dict: of :meth:`state_dict`. A state of any other torch scheduler serves too, by its ``last_epoch``.

        Raises:
            ValueError: no ``last_epoch`` in it; more steps are done than this schedule has; or the schedule does not
                fit a block, since ratios or ``total_steps`` have changed.
        """
        step = state_dict.get("last_epoch")
        if not isinstance(step, int):
            raise ValueError(
                f"the state of a schedule has last_epoch={step!r}; expected the number of steps done: is it the "
                "state_dict() of a schedule?"
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
        """Warn, or keep the text for a caller that collects :attr:`notes`."""
        if self.notes is None:
            warnings.warn(text, stacklevel=3)
        else:
            self.notes.append(text)

    def note_group_changes(self, text: str) -> None:
        """Note what has changed in the optimizer's groups."""
        self._groups_noted = True
        self.note(text)

    def resume_at(self, step: int) -> None:
        """Go on after `step` updates: every learning rate becomes that of this step."""
        self.last_epoch, self._step_count = step, step + 1
        self.set_lrs()

    def set_lrs(self) -> None:
        """Set every group's learning rate to that of the current step; of a tensor, in place."""
        groups = self.optimizer.param_groups
        for group, lr in zip(groups, self.get_lr()):
            if isinstance(group["lr"], torch.Tensor):  # a compiled step may hold on to it
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = [
            lr.clone() if isinstance(lr := group["lr"], torch.Tensor) else lr for group in groups
        ]

    def owns_lrs(self, last: Sequence[float | torch.Tensor] | None = None) -> bool:
        """Whether the groups' learning rates are those that this schedule (or the one with `last`) set.

        Inside torch's SequentialLR another scheduler may have the turn; its learning rates are left alone.
        """
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        last = self._last_lr if last is None else last
        return all(math.isclose(float(lr), float(own), rel_tol=1e-6) for lr, own in zip(lrs, last))

    def _changes(self, state: Mapping[str, Any], step: int) -> list[str]:
        """What a saved schedule had otherwise, in words: "total_steps 20 -> 60"."""
        if "total_steps" not in state:  # of another scheduler
            return []
        saved = {"warmup_start": "zero", **state}  # which earlier versions had
        changed = [key for key in _SETTINGS if key in saved and saved[key] != getattr(self, key)]
        if step >= max(saved["warmup_steps"], self.warmup_steps):
            changed = [key for key in changed if key != "warmup_start"]
        return [f"{key} {saved[key]} -> {getattr(self, key)}" for key in changed] + self._moved_peaks(saved)

    def _moved_peaks(self, state: Mapping[str, Any]) -> list[str]:
        """The changed peaks, where the optimizer's own state has not told of them."""
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
        """The largest ratio whose warm-up fits the run: infinite unless ``warmup="equal_slope"``."""
        if self.warmup != "equal_slope" or self.warmup_steps <= 0:
            return math.inf
        room = self.total_steps / 3 if self.shape == "wsd" else self.total_steps
        return room / self.warmup_steps * (1 - 1e-9)  # a ratio is rounded when it is set

    @property
    def begins_at_zero(self) -> bool:
        """Whether the first update has learning rate 0."""
        return self.warmup_start == "zero" and self.warmup_steps > 0

    @staticmethod
    def _record_peaks(group: dict[str, Any]) -> None:
        group.setdefault("initial_lr", float(group["lr"]))
        if group.get("decay") == "constant":
            group.setdefault("peak_weight_decay", group["weight_decay"])

    def _lr(self, group: dict[str, Any], step: int, ratio: float | None = None) -> float:
        """The group's learning rate at `step`; with `ratio`, what it would be if its ratio were that."""
        peak, own_ratio = float(group["initial_lr"]), float(group.get("lr_ratio", 1.0))
        if ratio is not None:
            peak = ratio * peak / own_ratio
        return block_lr(
            max(step, 0),  # SequentialLR takes back the first step of a schedule whose turn comes later
            peak=peak,
            ratio=own_ratio if ratio is None else ratio,
            shape=self.shape,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            floor=self.floor,
            floor_mode=self.floor_mode,
            warmup=self.warmup,
            warmup_start=self.warmup_start,
        )

    def _decay_factor(self, group: dict[str, Any], step: int) -> float:
        """What keeps lr_b(t) * weight_decay_b(t) equal to lr_base(t) * weight_decay, from decay / ratio at the peak."""
        own, base = self._lr(group, step), self._lr(group, step, ratio=1.0)
        return float(group["lr_ratio"]) * base / own if own > 0 else 1.0


def cosine_schedule(
    optimizer: Optimizer,
    *,
    warmup_steps: float,
    total_steps: int,
    floor: float = 0.0,
    floor_mode: FloorMode = "shared",
    warmup: WarmupMode = "shared",
    warmup_start: WarmupStart = "above_zero",
    last_epoch: int = -1,
    on_change: OnChange = "error",
) -> BlockwiseSchedule:
    """Warm-up, then cosine decay of every block from its own peak; a torch LRScheduler, stepped once an update.

    Args:
        optimizer: an optimizer on the groups of :func:`param_groups` (others count as ratio 1).
        warmup_steps: linear warm-up in steps, or below 1 as a share of total_steps (0.1 is 10 %). The last update of
            the warm-up has the peak.
        total_steps: optimizer steps in the run.
        floor: final learning rate of a block whose ratio is 1. Default 0; the paper takes base / 20 or / 10.
        floor_mode: "shared" (default, the paper's): every block ends at ``min(floor, its peak)``;
            "proportional": at ``ratio * floor``, so that the ratios hold to the end.
        warmup: "shared" (default): all blocks warm up over the same steps; "equal_slope": over ratio times as
            many, so that all rise at one slope (``alpha`` in the authors' code).
        warmup_start: "above_zero" (default): the first update has ``peak / warmup_steps``; "zero": it has 0, as in the
            authors' code. A compiled ``optimizer.step`` turns a learning rate of 0 into NaN.
        last_epoch: as in torch; -1 starts from step 0.
        on_change: what ``optimizer.load_state_dict`` does with a state of another base learning rate or other ratios.
            "error" (default) raises ValueError and names both; "use_new" keeps those of the groups, and their weight
            decay and betas.

    Raises:
        ValueError: warm-up not shorter than the run, or a floor above the base learning rate.

    Example:
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=6e-4)
        >>> scheduler = cosine_schedule(optimizer, warmup_steps=2, total_steps=10, floor=3e-5)
        >>> scheduler.get_last_lr()
        [0.0003]
    """
    return BlockwiseSchedule(
        optimizer,
        shape="cosine",
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        floor=floor,
        floor_mode=floor_mode,
        warmup=warmup,
        warmup_start=warmup_start,
        last_epoch=last_epoch,
        on_change=on_change,
    )


def wsd_schedule(
    optimizer: Optimizer,
    *,
    warmup_steps: float,
    total_steps: int,
    floor: float = 0.0,
    floor_mode: FloorMode = "shared",
    warmup: WarmupMode = "shared",
    warmup_start: WarmupStart = "above_zero",
    last_epoch: int = -1,
    on_change: OnChange = "error",
) -> BlockwiseSchedule:
    """The paper's warm-up, stable, decay schedule of every block (:func:`wsd`); a torch LRScheduler.

    Args:
        optimizer, warmup_steps, total_steps, floor, last_epoch, on_change: as for :func:`cosine_schedule`.
        floor_mode: "shared" (default): every block ends at ``min(floor, its peak)``; "proportional": no block comes
            down to the base learning rate in the second third, each stays at its peak until 2T/3 and then decays to
            ``ratio * floor``.
        warmup, warmup_start: as for :func:`cosine_schedule`.

    Raises:
        ValueError: warm-up longer than a third of the run, or a floor above the base learning rate.

    Example:
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=6e-4)
        >>> scheduler = wsd_schedule(optimizer, warmup_steps=2, total_steps=30, floor=3e-5)
        >>> scheduler.get_last_lr()
        [0.0003]
    """
    return BlockwiseSchedule(
        optimizer,
        shape="wsd",
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        floor=floor,
        floor_mode=floor_mode,
        warmup=warmup,
        warmup_start=warmup_start,
        last_epoch=last_epoch,
        on_change=on_change,
    )
