"""Learning-rate schedules with a peak per block: pure functions of the step, and the torch scheduler on them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

FloorMode = Literal["shared", "proportional"]
WarmupMode = Literal["shared", "equal_slope"]


def cosine(step: float, *, peak: float, warmup_steps: float, total_steps: int, floor: float) -> float:
    """Learning rate of one block at `step`: linear warm-up to `peak`, then cosine decay to `floor`.

        lr(t) = peak * t / warmup                                     t < warmup
        lr(t) = floor + (peak - floor) * (1 + cos(pi * u)) / 2        u = (t - warmup) / (total - warmup)

    With one floor for all blocks the ratio between two blocks shrinks to 1 as training ends (METHOD section 3,
    the authors' schedule); a proportional floor is ``floor = peak * fraction``.

    Args:
        step: optimizer steps taken so far; beyond total_steps the learning rate stays at the floor.
        peak: the block's largest learning rate, ratio times base.
        warmup_steps: length of the warm-up in steps, 0 <= warmup_steps < total_steps.
        total_steps: optimizer steps in the run.
        floor: learning rate at total_steps, 0 <= floor <= peak.

    Raises:
        ValueError: warmup_steps >= total_steps, or floor > peak (with the numbers, and what to change).

    Example:
        >>> cosine(1000, peak=6e-3, warmup_steps=1000, total_steps=50_000, floor=3e-5)
        0.006
    """
    _check(peak, warmup_steps, total_steps, floor)
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def wsd(
    step: float, *, peak: float, base: float, warmup_steps: float, total_steps: int, floor: float
) -> float:
    """Learning rate of one block at `step` under the paper's warm-up, stable, decay schedule of three phases.

        peak                                      warm-up to T/3
        peak falls linearly to min(peak, base)    T/3 to 2T/3
        that falls linearly to floor              2T/3 to T

    So blocks above the base learning rate come down to it first, and then all decay together (METHOD section 3,
    read in the authors' code). A block whose ratio is below 1 keeps its peak until 2T/3: it has nowhere to come
    down from. With ratio 1 this is the ordinary WSD schedule that decays over the last third.

    Args:
        step: optimizer steps taken so far; beyond total_steps the learning rate stays at the floor.
        peak: the block's largest learning rate, ratio times base.
        base: the base learning rate.
        warmup_steps: length of the linear warm-up in steps, at most total_steps / 3.
        total_steps: T, optimizer steps in the run.
        floor: learning rate at T, at most min(peak, base).

    Raises:
        ValueError: warm-up longer than T/3, or a floor above the learning rate it is to end.

    Example:
        >>> steps = (5, 100, 150, 200)
        >>> [wsd(t, peak=8.0, base=1.0, warmup_steps=10, total_steps=300, floor=0.1) for t in steps]
        [4.0, 8.0, 4.5, 1.0]
    """
    _check(min(peak, base), warmup_steps, total_steps, floor)
    if warmup_steps > total_steps / 3:
        raise ValueError(
            f"warm-up takes {warmup_steps:g} steps, but the wsd schedule starts to decay at a third of total_steps="
            f"{total_steps}: warm up for at most {total_steps // 3} steps, or train for longer"
        )
    if step < warmup_steps:
        return peak * step / warmup_steps
    shoulder = min(peak, base)
    thirds = 3 * step / total_steps
    if thirds <= 1:
        return peak
    if thirds <= 2:
        return peak + (shoulder - peak) * (thirds - 1)
    return shoulder + (floor - shoulder) * (min(thirds, 3.0) - 2)


def _check(peak: float, warmup_steps: float, total_steps: int, floor: float) -> None:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warm-up takes {warmup_steps:g} steps, but the run has total_steps={total_steps}: "
            f"expected 0 <= warm-up < total_steps; shorten the warm-up or train for longer"
        )
    if not 0 <= floor <= peak:
        raise ValueError(
            f"floor={floor:g} is not between 0 and the peak learning rate {peak:g}: lower the floor or raise the peak"
        )


class BlockwiseSchedule(LRScheduler):
    """A schedule for the groups of :func:`param_groups`; made by :func:`cosine_schedule` and :func:`wsd_schedule`.

    Every learning rate is computed from the step and the group's own ``initial_lr`` and ``lr_ratio``, never
    from the current ``lr``. So it is right after a resume, after ``add_param_group`` (the new group's ``lr`` is
    taken as its peak) and after something else has overwritten a group's ``lr``. Groups with ``decay="constant"`` have
    their ``weight_decay`` kept so that ``lr * weight_decay`` is the base learning rate's at every step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        shape: Literal["cosine", "wsd"],
        warmup_steps: int,
        total_steps: int,
        floor: float,
        floor_mode: FloorMode = "shared",
        warmup: WarmupMode = "shared",
        last_epoch: int = -1,
    ) -> None:
        if floor_mode not in ("shared", "proportional"):
            raise ValueError(f'floor_mode is {floor_mode!r}; expected "shared" or "proportional"')
        if warmup not in ("shared", "equal_slope"):
            raise ValueError(f'warmup is {warmup!r}; expected "shared" or "equal_slope"')
        self.shape = shape
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.floor = floor
        self.floor_mode = floor_mode
        self.warmup = warmup
        for group in optimizer.param_groups:
            self._adopt(group)
            self._lr(group, 0)  # refuse an impossible schedule now and not in the middle of a run
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Learning rate of each group at the current step, in closed form."""
        lrs: list[float | torch.Tensor] = []
        for group in self.optimizer.param_groups:
            self._adopt(group)
            lrs.append(self._lr(group, self.last_epoch))
            if group.get("decay") == "constant":
                group["weight_decay"] = group["peak_weight_decay"] * self._decay_factor(
                    group, self.last_epoch
                )
        return lrs

    @staticmethod
    def _adopt(group: dict[str, Any]) -> None:
        group.setdefault("initial_lr", float(group["lr"]))
        if group.get("decay") == "constant":
            group.setdefault("peak_weight_decay", group["weight_decay"])

    def _lr(self, group: dict[str, Any], step: int, ratio: float | None = None) -> float:
        """The group's learning rate at `step`; with `ratio`, what it would be if its ratio were that."""
        own_ratio = float(group.get("lr_ratio", 1.0))
        base = float(group["initial_lr"]) / own_ratio
        if ratio is None:
            ratio, peak = own_ratio, float(group["initial_lr"])
        else:
            peak = ratio * base
        if not 0 <= self.floor <= base:
            name = f"block {group['block']}" if "block" in group else "a group"
            raise ValueError(
                f"floor={self.floor:g} is not between 0 and the base learning rate {base:g} of {name}: "
                f"lower the floor or raise the base learning rate"
            )
        # DESIGN section 2: a block slower than the floor stays at its own peak instead of being raised to the floor.
        floor = ratio * self.floor if self.floor_mode == "proportional" else min(self.floor, peak)
        warmup_steps = self.warmup_steps * (ratio if self.warmup == "equal_slope" else 1.0)
        if self.shape == "cosine":
            return cosine(
                step, peak=peak, warmup_steps=warmup_steps, total_steps=self.total_steps, floor=floor
            )
        # With a proportional floor nothing makes the blocks meet, so a block's own peak stands in for the base.
        base = peak if self.floor_mode == "proportional" else base
        return wsd(
            step, peak=peak, base=base, warmup_steps=warmup_steps, total_steps=self.total_steps, floor=floor
        )

    def _decay_factor(self, group: dict[str, Any], step: int) -> float:
        """What keeps lr_b(t) * weight_decay_b(t) equal to lr_base(t) * weight_decay, from decay / ratio at the peak."""
        own, base = self._lr(group, step), self._lr(group, step, ratio=1.0)
        return float(group["lr_ratio"]) * base / own if own > 0 else 1.0


def cosine_schedule(
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    floor: float = 0.0,
    floor_mode: FloorMode = "shared",
    warmup: WarmupMode = "shared",
    last_epoch: int = -1,
) -> BlockwiseSchedule:
    """Warm-up, then cosine decay of every block from its own peak; a torch LRScheduler, stepped once an update.

    Args:
        optimizer: an optimizer on the groups of :func:`param_groups` (others count as ratio 1).
        warmup_steps: linear warm-up in steps. The first update has learning rate 0, as in the authors' code.
        total_steps: optimizer steps in the run.
        floor: final learning rate of a block whose ratio is 1. Default 0; the paper takes base / 20 or / 10.
        floor_mode: "shared" (default, the paper's): every block ends at ``min(floor, its peak)``;
            "proportional": at ``ratio * floor``, so that the ratios hold to the end.
        warmup: "shared" (default): all blocks warm up over the same steps; "equal_slope": over ratio times as
            many, so that all rise at one slope (``alpha`` in the authors' code).
        last_epoch: as in torch; -1 starts from step 0.

    Raises:
        ValueError: warm-up not shorter than the run, or a floor above the base learning rate.

    Example:
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=6e-4)
        >>> scheduler = cosine_schedule(optimizer, warmup_steps=2, total_steps=10, floor=3e-5)
        >>> scheduler.get_last_lr()
        [0.0]
    """
    return BlockwiseSchedule(
        optimizer,
        shape="cosine",
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        floor=floor,
        floor_mode=floor_mode,
        warmup=warmup,
        last_epoch=last_epoch,
    )


def wsd_schedule(
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    floor: float = 0.0,
    floor_mode: FloorMode = "shared",
    warmup: WarmupMode = "shared",
    last_epoch: int = -1,
) -> BlockwiseSchedule:
    """The paper's warm-up, stable, decay schedule of every block (:func:`wsd`); arguments as :func:`cosine_schedule`.

    With ``floor_mode="proportional"`` no block comes down to the base learning rate in the second third: each
    stays at its peak until 2T/3 and then decays to ``ratio * floor``.

    Raises:
        ValueError: warm-up longer than a third of the run, or a floor above the base learning rate.

    Example:
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=6e-4)
        >>> scheduler = wsd_schedule(optimizer, warmup_steps=2, total_steps=30, floor=3e-5)
        >>> scheduler.get_last_lr()
        [0.0]
    """
    return BlockwiseSchedule(
        optimizer,
        shape="wsd",
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        floor=floor,
        floor_mode=floor_mode,
        warmup=warmup,
        last_epoch=last_epoch,
    )
