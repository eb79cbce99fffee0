"""Blockwise learning rates in Lightning: ``configure_optimizers`` in two lines, and a callback."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from blockwise_lr.arguments import check_model, check_options
from blockwise_lr.blocks import BlockMap
from blockwise_lr.integrations.block_monitor import BlockMonitor, check_strategy
from blockwise_lr.integrations.carry_over import carry_over_moments
from blockwise_lr.optim import BlockwiseSchedule, Ratios, param_groups
from blockwise_lr.optim.curves import FloorMode, WarmupMode, WarmupStart
from blockwise_lr.optim.decay import WEIGHT_DECAY, Decay, NoDecay, WeightDecay
from blockwise_lr.optim.initial_scales import RelativeTo
from blockwise_lr.optim.load_hooks import compare_when_loading
from blockwise_lr.optim.saved_groups import OnChange, check_on_change

__all__ = ["BlockMonitor", "configure_optimizers_by_block", "name_groups"]

ScheduleShape = Literal["cosine", "wsd"]


def configure_optimizers_by_block(
    module: nn.Module,
    lr: float,
    ratios: Ratios | None = None,
    *,
    schedule: ScheduleShape | None = "cosine",
    warmup_steps: float = 0.02,
    total_steps: int | None = None,
    floor: float | None = None,
    floor_mode: FloorMode = "shared",
    warmup: WarmupMode = "shared",
    warmup_start: WarmupStart = "above_zero",
    on_change: OnChange = "error",
    weight_decay: WeightDecay = WEIGHT_DECAY,
    no_decay: NoDecay = (),
    decay: Decay = "coupled",
    relative_to: RelativeTo = None,
    blocks: BlockMap | None = None,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    **optimizer_kwargs: Any,
) -> dict[str, Any]:
    """Return an optimizer and a schedule with a learning rate per block, as ``configure_optimizers`` returns them.

    The groups have unique names (:func:`name_groups`), so Lightning's ``LearningRateMonitor`` logs ``lr-AdamW/emb``.
    The schedule advances with every optimizer step. Call ``split_fused(model)`` in the module's constructor, before
    Lightning wraps the module.

    Args:
        module: the LightningModule (``self``). All of its trainable parameters are in the optimizer.
        lr: base learning rate, which is the peak of a block whose ratio is 1.
        ratios: as in :func:`blockwise_lr.param_groups`. Default: None, for the default of that function.
        weight_decay, no_decay, decay, relative_to, blocks: as in :func:`blockwise_lr.param_groups`.
        schedule: "cosine" (default) or "wsd" for :func:`blockwise_lr.cosine_schedule` or
            :func:`blockwise_lr.wsd_schedule`. None: no schedule. Add one of your own with
            :func:`blockwise_lr.scale_by_block`.
        warmup_steps: length of the warm-up in steps; below 1, a fraction of the run. Default: 2 % of the run. Under
            ``Trainer(fast_dev_run=...)``, whose few steps leave no room for one, there is no warm-up.
        total_steps: number of optimizer steps in the run. Default: the trainer's ``estimated_stepping_batches``.
        floor: final learning rate of a block with ratio 1. Default: lr / 20.
        floor_mode, warmup, warmup_start: as in :func:`blockwise_lr.cosine_schedule`.
        on_change: what to do if ``fit(..., ckpt_path=...)`` resumes from another base learning rate, other ratios or
            other groups. "error" (default) raises ValueError, which names the difference. "use_new" keeps these
            settings and loads only the optimizer's moments.
        optimizer_cls: any torch optimizer. Default: AdamW.
        optimizer_kwargs: passed to the optimizer (``betas``, ``fused`` ...).

    Returns:
        A dictionary with the keys "optimizer" and, unless `schedule` is None, "lr_scheduler".

    Raises:
        ValueError: the number of steps is unknown; `schedule` is unknown; or the strategy flattens the parameters.
            Also the errors of :func:`blockwise_lr.param_groups` and of the schedule.

    Example:
        >>> class LanguageModel(LightningModule):  # doctest: +SKIP
        ...     def configure_optimizers(self):
        ...         return configure_optimizers_by_block(self, lr=6e-4, ratios="measured", betas=(0.9, 0.95))
    """
    check_options(optimizer_kwargs, "configure_optimizers_by_block")
    check_model(module, "configure_optimizers_by_block")
    check_on_change(on_change)
    if schedule not in ("cosine", "wsd", None):
        raise ValueError(f'schedule is {schedule!r}; expected "cosine", "wsd" or None')
    trainer = _trainer_of(module)
    if trainer is not None:
        check_strategy(trainer.strategy)
    settings: dict[str, Any] = {
        "weight_decay": weight_decay, "no_decay": no_decay, "decay": decay, "relative_to": relative_to,
        "blocks": blocks,
    }  # fmt: skip
    groups = param_groups(module, lr, **settings | ({} if ratios is None else {"ratios": ratios}))
    optimizer = optimizer_cls(name_groups(groups), lr=lr, **optimizer_kwargs)  # type: ignore[call-arg]
    if on_change == "use_new":
        # AutoRatios may move the ratios of this optimizer: its saved state is loaded too.
        carry_over_moments(optimizer, module, on_change, ratios_move=True)
    else:
        compare_when_loading(optimizer, on_change)
    if schedule is None:
        return {"optimizer": optimizer}
    built = BlockwiseSchedule(
        optimizer,
        shape=schedule,
        warmup_steps=0 if getattr(trainer, "fast_dev_run", False) else warmup_steps,
        total_steps=_steps_of_run(module, trainer) if total_steps is None else total_steps,
        floor=lr / 20 if floor is None else floor,
        floor_mode=floor_mode,
        warmup=warmup,
        warmup_start=warmup_start,
        on_change=on_change,
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": built, "interval": "step"}}


def name_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each parameter group a unique ``name``, under which Lightning's ``LearningRateMonitor`` logs it.

    The name is that of the block. If a block has several groups, the group without weight decay gets "-no-decay"
    behind the name.

    Args:
        groups: from :func:`blockwise_lr.param_groups`. They are changed in place.

    Returns:
        The same groups, as a list.

    Example:
        >>> from blockwise_lr import param_groups
        >>> model = nn.ModuleDict({"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)})
        >>> [group["name"] for group in name_groups(param_groups(model, lr=1e-3, no_decay="1d"))]
        ['norm', 'emb']
    """
    groups = list(groups)
    sizes = Counter(group["block"] for group in groups)
    taken: Counter[str] = Counter()
    for group in groups:
        name = group["block"]
        if sizes[name] > 1 and not group["weight_decay"]:
            name += "-no-decay"
        taken[name] += 1
        group["name"] = name if taken[name] == 1 else f"{name}-{taken[name]}"
    return groups


def _trainer_of(module: nn.Module) -> Any:
    """Return the trainer that runs a LightningModule; None if there is none."""
    try:
        return getattr(module, "trainer", None)
    except RuntimeError:  # a LightningModule outside of a trainer
        return None


def _steps_of_run(module: nn.Module, trainer: Any) -> int:
    """Return the number of optimizer steps that the trainer will take.

    Raises:
        ValueError: there is no trainer, or its run has no end that is known.
    """
    if trainer is None:
        raise ValueError(
            f"the number of optimizer steps is not known, because this {type(module).__name__} has no trainer: call "
            "configure_optimizers_by_block(self, ...) in configure_optimizers of a LightningModule, or give "
            "total_steps=..."
        )
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise ValueError(
            "the number of optimizer steps is not known, because this trainer has no last step or the length of its "
            "data is not known: give Trainer(max_steps=...), or total_steps=... here"
        )
    return int(steps)
