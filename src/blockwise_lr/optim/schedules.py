"""torch schedulers with a peak per block, on the pure functions of curves.py."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from blockwise_lr.optim.curves import FloorMode, Shape, WarmupMode, block_lr
from blockwise_lr.optim.one_rate import schedule_owns
from blockwise_lr.optim.warmup import warmup_in_steps


class BlockwiseSchedule(LRScheduler):
    """A schedule for the groups of :func:`param_groups`; made by :func:`cosine_schedule` and :func:`wsd_schedule`.

    Every learning rate is computed from the step and the group's own ``initial_lr`` and ``lr_ratio``, never
    from the current ``lr``. So it is right after a resume, and, from the next ``step()`` of the schedule on, after
    ``add_param_group`` (the new group's ``lr`` is its peak) and after something else has overwritten an ``lr``.
    Groups with ``decay="constant"`` have their ``weight_decay`` kept so that ``lr * weight_decay`` is the base
    learning rate's at every step.
    """

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
        last_epoch: int = -1,
    ) -> None:
        self.shape = shape
        self.warmup_steps = warmup_in_steps(warmup_steps, total_steps)
        self.total_steps = total_steps
        self.floor = floor
        self.floor_mode = floor_mode
        self.warmup = warmup
        for group in optimizer.param_groups:
            self._adopt(group)
            self._lr(group, 0)  # refuse an impossible schedule now and not in the middle of a run
        super().__init__(optimizer, last_epoch)
        schedule_owns(optimizer, self)

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
        peak, own_ratio = float(group["initial_lr"]), float(group.get("lr_ratio", 1.0))
        if ratio is not None:
            peak = ratio * peak / own_ratio
        return block_lr(
            step,
            peak=peak,
            ratio=own_ratio if ratio is None else ratio,
            shape=self.shape,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            floor=self.floor,
            floor_mode=self.floor_mode,
            warmup=self.warmup,
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
    last_epoch: int = -1,
) -> BlockwiseSchedule:
    """Warm-up, then cosine decay of every block from its own peak; a torch LRScheduler, stepped once an update.

    Args:
        optimizer: an optimizer on the groups of :func:`param_groups` (others count as ratio 1).
        warmup_steps: linear warm-up in steps, or below 1 as a share of total_steps (0.1 is 10 %). The first update has
            learning rate 0, as in the authors' code.
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
    warmup_steps: float,
    total_steps: int,
    floor: float = 0.0,
    floor_mode: FloorMode = "shared",
    warmup: WarmupMode = "shared",
    last_epoch: int = -1,
) -> BlockwiseSchedule:
    """The paper's warm-up, stable, decay schedule of every block (:func:`wsd`); a torch LRScheduler.

    Args:
        optimizer, warmup_steps, total_steps, floor, last_epoch: as for :func:`cosine_schedule`.
        floor_mode: "shared" (default): every block ends at ``min(floor, its peak)``; "proportional": no block comes
            down to the base learning rate in the second third, each stays at its peak until 2T/3 and then decays to
            ``ratio * floor``.
        warmup: as for :func:`cosine_schedule`.

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
