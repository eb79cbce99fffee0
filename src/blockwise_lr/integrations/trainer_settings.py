"""What BlockwiseTrainer adds to TrainingArguments, and the parameter groups and the schedule made from both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments

from blockwise_lr.integrations.scales_at_start import Blocks, ScalesAtStart, resolve_blocks
from blockwise_lr.integrations.trainer_schedules import (
    ScheduleName,
    TrainerSchedule,
    base_lr,
    choose_schedule,
)
from blockwise_lr.optim.blockwise_schedule import BlockwiseSchedule
from blockwise_lr.optim.curves import FloorMode, WarmupMode, WarmupStart
from blockwise_lr.optim.decay import Decay, NoDecay, WeightDecay, resolve_decay
from blockwise_lr.optim.groups import param_groups
from blockwise_lr.optim.saved_groups import OnChange, check_on_change


@dataclass(frozen=True)
class TrainerSettings:
    """The arguments of :class:`BlockwiseTrainer` that determine its groups and its schedule, which documents them.

    Raises:
        ValueError: `on_change` is neither "error" nor "use_new".
    """

    ratios: Mapping[Any, float]
    schedule: ScheduleName | None
    floor: float | None
    floor_mode: FloorMode
    warmup: WarmupMode
    warmup_start: WarmupStart
    on_change: OnChange
    weight_decay: WeightDecay | None
    no_decay: NoDecay
    decay: Decay
    blocks: Blocks

    def __post_init__(self) -> None:
        check_on_change(self.on_change)

    def groups(
        self, model: nn.Module, args: TrainingArguments, scales: ScalesAtStart
    ) -> list[dict[str, Any]]:
        """Return the parameter groups of the model that is trained, with its scales at start."""
        base = args.weight_decay
        given = base if self.weight_decay is None else self.weight_decay
        decays, decay = resolve_decay(given, self.decay, base)
        return param_groups(
            model,
            args.learning_rate,
            self.ratios,
            weight_decay=decays,
            no_decay=self.no_decay,
            decay=decay,
            relative_to=scales.of(model),
            blocks=resolve_blocks(model, self.blocks),
        )

    def choose_schedule(self, args: TrainingArguments) -> ScheduleName:
        """Return whose schedule is used, as :func:`choose_schedule`, which raises ValueError for contradictions."""
        return choose_schedule(self.schedule, args, floor=self.floor, warmup=self.warmup)

    def make_schedule(self, optimizer: Any, args: TrainingArguments, total_steps: int) -> BlockwiseSchedule:
        """Return the schedule of an optimizer, which may be wrapped by accelerate."""
        inner = _torch_optimizer(optimizer)
        shape = self.choose_schedule(args)
        if shape == "trainer":
            return TrainerSchedule(inner, args, total_steps, on_change=self.on_change)
        return BlockwiseSchedule(
            inner,
            shape=shape,
            warmup_steps=args.get_warmup_steps(total_steps),
            total_steps=total_steps,
            floor=args.learning_rate / 20 if self.floor is None else self.floor,
            floor_mode=self.floor_mode,
            warmup=self.warmup,
            warmup_start=self.warmup_start,
            on_change=self.on_change,
        )


class LearningRateRecord(TrainerCallback):
    """Record the learning rates that each update uses; the scheduler advances before Trainer logs them."""

    def __init__(self) -> None:
        self.base: float | None = None
        self.by_block: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.base = base_lr(kwargs["optimizer"], kwargs.get("lr_scheduler"))
        self.by_block = {g["block"]: float(g["lr"]) for g in kwargs["optimizer"].param_groups if "block" in g}


def _torch_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer inside accelerate's wrapper, because torch's schedulers patch its ``step`` method."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        warnings.warn(
            f"{type(inner).__name__} is not a torch optimizer; its learning rates may not be scheduled",
            stacklevel=3,
        )
    return inner  # type: ignore[no-any-return]
