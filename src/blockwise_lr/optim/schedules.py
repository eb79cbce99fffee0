"""The cosine and the WSD schedule, with a peak learning rate per block."""

from __future__ import annotations

from torch.optim import Optimizer

from blockwise_lr.optim.blockwise_schedule import BlockwiseSchedule
from blockwise_lr.optim.curves import FloorMode, WarmupMode, WarmupStart
from blockwise_lr.optim.saved_groups import OnChange


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
    """Return a schedule with linear warm-up and cosine decay, where each block has its own peak.

    The schedule is a torch LRScheduler. Call its ``step()`` once per optimizer step.

    Args:
        optimizer: an optimizer on the groups of :func:`param_groups`. Groups without ``lr_ratio`` have ratio 1.
        warmup_steps: length of the linear warm-up in steps. A value below 1 is a fraction of total_steps (0.1 is 10 %).
            The last update of the warm-up has the peak learning rate.
        total_steps: number of optimizer steps in the run.
        floor: final learning rate of a block whose ratio is 1. Default 0. The paper uses base / 20 or base / 10.
        floor_mode: "shared" (default, as in the paper): every block ends at ``min(floor, its peak)``.
            "proportional": each block ends at ``ratio * floor``, so the ratios stay constant until the end.
        warmup: "shared" (default): all blocks warm up over the same number of steps. "equal_slope": a block warms up
            over ratio times as many steps, so all blocks rise with the same slope (``alpha`` in the authors' code).
        warmup_start: "above_zero" (default): the first update has learning rate ``peak / warmup_steps``. "zero": the
            first update has learning rate 0, as in the authors' code. A compiled ``optimizer.step`` turns a learning
            rate of 0 into NaN.
        last_epoch: as in torch; -1 starts at step 0.
        on_change: what ``optimizer.load_state_dict`` does if the saved base learning rate or ratios differ from those
            of the groups. "error" (default) raises ValueError and names both. "use_new" keeps the values of the
            groups, including their weight decay and betas.

    Returns:
        The schedule; its learning rates are already set in the groups.

    Raises:
        ValueError: the warm-up is not shorter than the run, or the floor is above the base learning rate.

    Example:
        >>> import torch
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
    """Return the paper's warm-up-stable-decay (WSD) schedule, where each block has its own peak.

    The schedule is a torch LRScheduler. :func:`blockwise_lr.optim.wsd` gives the formula.

    Args:
        optimizer, warmup_steps, total_steps, floor, last_epoch, on_change: as in :func:`cosine_schedule`.
        floor_mode: "shared" (default): every block ends at ``min(floor, its peak)``. "proportional": each block stays
            at its peak for two thirds of the run, without an earlier decay to the base learning rate. It then decays to
            ``ratio * floor``.
        warmup, warmup_start: as in :func:`cosine_schedule`.

    Returns:
        The schedule; its learning rates are already set in the groups.

    Raises:
        ValueError: the warm-up is longer than a third of the run, or the floor is above the base learning rate.

    Example:
        >>> import torch
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
