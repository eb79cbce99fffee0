"""The optimizer of a run: its class and options, its parameter groups, and its learning rate at each step."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from blockwise_lr.optim.curves import block_lr
from blockwise_lr.optim.decay import resolve_decay
from blockwise_lr.optim.groups import param_groups
from blockwise_lr.optimizers.registry import optimizer_class, optimizer_entry
from blockwise_lr.train.config import OptimConfig, TrainConfig
from blockwise_lr.train.settings import OptimSettings


def optimizer_of_run(optim: OptimConfig) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class and the keyword arguments of a run's optimizer. Raises as :func:`optimizer_class`."""
    return optimizer_class(optim.optimizer, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)


def groups_of_run(optim: OptimConfig, settings: OptimSettings, model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups of a run on its model.

    Args:
        optim: the run's configuration of the optimizer.
        settings: the typed values of the same configuration.
        model: the run's model, split.

    Raises:
        ValueError: as :func:`blockwise_lr.param_groups`.
    """
    by_block = settings.weight_decay_by_block
    return param_groups(
        model,
        optim.base_lr,
        settings.ratios,
        weight_decay=resolve_decay(by_block, optim.decay, settings.weight_decay)[0]
        if by_block
        else settings.weight_decay,
        no_decay=settings.no_decay,
        decay=optim.decay,
        relative_to=settings.relative_to,
    )


def scheduled_lr(
    config: TrainConfig, settings: OptimSettings, step: int, *, peak: float, ratio: float
) -> float:
    """Return the learning rate that the run's schedule gives a block for the update after `step` others.

    Args:
        config: the run's configuration.
        settings: the typed values of the same configuration.
        step: optimizer steps taken so far.
        peak: the block's largest learning rate, ratio times base learning rate.
        ratio: the block's ratio.

    Raises:
        ValueError: the schedule does not fit that block.
    """
    optim = config.optim
    return block_lr(
        step,
        peak=peak,
        ratio=ratio,
        shape=optim.schedule,
        warmup_steps=settings.warmup_steps,
        total_steps=config.steps,
        floor=optim.base_lr * optim.floor_fraction,
        floor_mode=optim.floor,
        warmup=optim.warmup,
        warmup_start=optim.warmup_start,
    )


def optimizer_notices(optim: OptimConfig) -> list[str]:
    """Return what a user of AdamW should know about a run's optimizer before the run starts, one line each."""
    entry = optimizer_entry(optim.optimizer)
    notices = []
    if entry.lr_factor not in (None, 1.0):
        notices.append(
            f"{entry.name}: its base learning rate is usually about {entry.lr_factor:g} times AdamW's; this run's is "
            f"{optim.base_lr:g}"
        )
    if optim.weight_decay is not None and entry.name != "adamw" and optim.weight_decay != entry.weight_decay:
        notices.append(
            f"{entry.name}: the weight decay is this configuration's, {optim.weight_decay:g}; its own default is "
            f"{entry.weight_decay or 0.0:g}"
        )
    return notices
