"""Blockwise learning rates in transformers' Trainer: a subclass, and an optimizer factory for the plain one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from blockwise_lr.extras import check, explained

try:
    from transformers import PreTrainedModel, Trainer, TrainerCallback
except ModuleNotFoundError as error:
    raise explained(error, "BlockwiseTrainer and blockwise_optimizer need") from None

from blockwise_lr.experimental import AutoRatios, AutoRule
from blockwise_lr.experimental.auto_rule import parse_auto
from blockwise_lr.fp32 import Fp32Settings
from blockwise_lr.integrations.carry_over import carry_over, take_new_peaks
from blockwise_lr.integrations.factory import Blocks, blockwise_optimizer, resolve_blocks
from blockwise_lr.integrations.sharpness_callback import SharpnessCallback
from blockwise_lr.integrations.trainable import CheckTrainable
from blockwise_lr.integrations.trainer_clipping import TrainerClipping, check_engine, hides_parameters
from blockwise_lr.integrations.trainer_schedules import (
    ScheduleName,
    TrainerSchedule,
    base_lr,
    choose_schedule,
)
from blockwise_lr.optim import PAPER_RATIOS, BlockwiseSchedule, Ratios, param_groups
from blockwise_lr.optim.clipping import MaxNorm
from blockwise_lr.optim.curves import FloorMode, WarmupMode, WarmupStart
from blockwise_lr.optim.decay import Decay, NoDecay, WeightDecay, resolve_decay
from blockwise_lr.optim.ratios import given_ratios
from blockwise_lr.optim.saved_groups import OnChange, check_on_change

__all__ = ["BlockwiseTrainer", "SharpnessCallback", "blockwise_optimizer"]


class BlockwiseTrainer(Trainer):
    """transformers' Trainer with a learning rate and a schedule per block.

    The base learning rate, weight decay, betas, warm-up and clipping are Trainer's own arguments (``learning_rate``,
    ``weight_decay``, ``adam_beta1`` ..., ``warmup_steps``, ``max_grad_norm``), and so is the kind of optimizer
    (``optim``). Every block's learning rate is logged as ``lr/<block>``: the one that the logged step's update used;
    ``learning_rate`` is the base learning rate then, that of a block whose ratio is 1. What a
    :class:`SharpnessCallback` among the callbacks measures is logged too.

    Args:
        ratios: learning-rate ratio by block, or an :class:`blockwise_lr.AutoRule`, by which the run finds them itself
            (:attr:`auto`); the names "paper", "measured", "uniform" and "auto" stand for these. Default: the paper's.
        schedule: "cosine" or "wsd", this library's (:func:`blockwise_lr.cosine_schedule`,
            :func:`blockwise_lr.wsd_schedule`), or "trainer", that of ``args.lr_scheduler_type`` and
            ``args.lr_scheduler_kwargs``: every block at its ratio of what transformers' own function gives, to the
            end. Default: None, "trainer" if one of these two is not what TrainingArguments has by default ("linear",
            no kwargs), otherwise "cosine". So a "linear" that you set yourself needs ``schedule="trainer"``.
        floor: final learning rate of a block whose ratio is 1. Default: learning_rate / 20. Of this library's
            schedules only.
        floor_mode, warmup, warmup_start: as in :func:`blockwise_lr.cosine_schedule`.
        on_change: what a resume does with a checkpoint of another base learning rate, other ratios or other groups.
            "error" (default) raises ValueError and names both; "use_new" keeps the settings of this trainer, and takes
            the moments alone. A longer or shorter run is no error: the schedule is this trainer's, and a warning names
            the change.
        weight_decay: as in :func:`blockwise_lr.param_groups`, but blocks that it does not name, and "coupled" and
            "constant", take ``args.weight_decay``. Default: that for all.
        no_decay, decay: as in :func:`blockwise_lr.param_groups`. Unlike Trainer, norms and biases do decay by default,
            since the paper's do.
        clip_by_block: largest gradient norm of each block, as ``max_norm`` of
            :func:`blockwise_lr.clip_grad_norm_by_block`. It takes the place of ``max_grad_norm``, which is then not
            looked at. Every block's norm is logged as ``grad_norm/<block>``; of a gradient that was not finite a
            warning names step, blocks and parameters (not under fp16, whose scaling expects some). Default: None,
            Trainer's own clipping.
        blocks: a BlockMap, where the model needs overrides; or a function that makes one from the model that is
            trained, where adapters are added later. Default: ``classify(model)``.
        optimizer_cls_and_kwargs: the kind of optimizer where ``args.optim`` does not know it, without ``params``.

    Raises:
        ValueError: ``optimizers`` given, since this class makes both; and as :func:`blockwise_lr.param_groups`,
            first of all for a fused QKV weight that was not split: call ``split_fused(model)`` before this;
            clip_by_block out of range, or under DeepSpeed, FSDP version 1 or XLA; `schedule` and
            ``lr_scheduler_type`` that contradict each other, ``lr_scheduler_kwargs`` that would not be used, or a type
            that is no function of the step (``reduce_lr_on_plateau``, ``greedy``). At the first step of ``train()``, if
            the optimizer's parameters are not the model's trainable ones.

    Trainers that are subclasses of Trainer themselves are mixed in: ``class SFT(BlockwiseTrainer, SFTTrainer)``.

    Unlike Trainer, it does not let ``torch_compile`` switch TF32 on: that takes ``tf32=True`` among the arguments.

    :attr:`auto` is closed when ``train()`` ends, by an error or Ctrl-C too; its ratios can still be read.

    Example:
        >>> trainer = BlockwiseTrainer(split_fused(model), args, train_dataset=data)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        ratios: Ratios = PAPER_RATIOS,
        schedule: ScheduleName | None = None,
        floor: float | None = None,
        floor_mode: FloorMode = "shared",
        warmup: WarmupMode = "shared",
        warmup_start: WarmupStart = "above_zero",
        on_change: OnChange = "error",
        weight_decay: WeightDecay | None = None,
        no_decay: NoDecay = (),
        decay: Decay = "coupled",
        clip_by_block: MaxNorm | None = None,
        blocks: Blocks = None,
        **kwargs: Any,
    ) -> None:
        check("BlockwiseTrainer needs", ["transformers"])  # an old version fails only at the first step
        if any(given is not None for given in kwargs.get("optimizers", ())):
            raise ValueError(
                "BlockwiseTrainer makes the optimizer and the scheduler itself: leave out `optimizers`, or use "
                "transformers.Trainer with param_groups(...) and cosine_schedule(...) of your own"
            )
        rule = parse_auto(ratios) if isinstance(ratios, str) else ratios
        self._rule = rule if isinstance(rule, AutoRule) else None
        self._ratios = given_ratios(self._rule or ratios, more=("auto",))
        self.auto: AutoRatios | None = None
        self._schedule = schedule
        self._floor = floor
        self._floor_mode = floor_mode
        self._warmup = warmup
        self._warmup_start = warmup_start
        check_on_change(on_change)
        self._on_change: OnChange = on_change
        self._weight_decay = weight_decay
        self._no_decay = no_decay
        self._decay = decay
        self._clipping = None if clip_by_block is None else TrainerClipping(clip_by_block)
        self._blocks = blocks
        self._step_loss: torch.Tensor | None = (
            None  # sum over the step's micro-batches so far, for the guard of auto
        )
        before = Fp32Settings.now()
        try:
            super().__init__(*args, **kwargs)
            self._choose_schedule()  # a contradiction is an error now and not after the data are loaded
        finally:
            before.restore()  # accelerate, too, switches TF32 on for torch_compile
        if self.args.torch_compile and self.args.tf32 is None and before.root == "tf32":
            replace(before, root="none").restore()  # as transformers found it
        if self._clipping is not None:
            check_engine(self.accelerator.distributed_type, fsdp2=self.accelerator.is_fsdp2)
        self._lr_record = _LearningRateRecord()
        self.add_callback(self._lr_record)
        hidden = hides_parameters(self.accelerator.distributed_type, fsdp2=self.accelerator.is_fsdp2)
        self.add_callback(CheckTrainable(lambda: cast("nn.Module", self.model), skip=hidden))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, and remove hooks at the end, after an error or Ctrl-C too."""
        self._attach_callbacks()
        try:
            return super().train(*args, **kwargs)
        finally:
            for each in self._sharpness_callbacks():
                each.detach()
            if self.auto is not None:
                self.auto.close()
            if self._clipping is not None:  # what no line of the log has reported
                self._clipping.read(warn=self._warns_of_gradients)

    def add_callback(self, callback: Any) -> None:
        """Trainer's, and a :class:`SharpnessCallback` gets what only the trainer knows."""
        super().add_callback(callback)
        self._attach_callbacks()  # those given to the constructor too

    def _attach_callbacks(self) -> None:
        for each in self._sharpness_callbacks():
            each.attach(self.log, self.compute_loss_context_manager)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's; afterwards the gradients of a whole step are there, and not clipped yet."""
        loss = super().training_step(*args, **kwargs)
        if self.auto is not None:
            # Trainer has divided each micro-batch's share by their number, or by the tokens of all of them: the loss of
            # the step is the sum of the shares, as in Trainer's own log.
            self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler  # of fp16
            for each in self._sharpness_callbacks():
                each.gradients(self.state, self.control, scale=scaler.get_scale() if scaler else 1.0)
            step_loss, self._step_loss = self._step_loss, None
            if self.auto is not None and self.auto.guards(self.state.global_step):
                self.auto.watch(float(self.accelerator.reduce(step_loss, "mean")))
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | None:
        # Only called where max_grad_norm is above 0, so the clipping by block is left to _get_grad_norm.
        return super()._clip_grad_norm(model) if self._clipping is None else None  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self._clipping is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        self.accelerator.unscale_gradients()  # of fp16
        optimizer = cast("Optimizer", self.optimizer)
        return self._clipping.clip(model, optimizer.param_groups, self.state.global_step)

    def _sharpness_callbacks(self) -> list[SharpnessCallback]:
        return [each for each in self.callback_handler.callbacks if isinstance(each, SharpnessCallback)]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW, or what ``args.optim`` names, on groups by block."""
        if self.optimizer is None:
            target = cast("PreTrainedModel", self.model if model is None else model)
            if self.optimizer_cls_and_kwargs is not None:
                optimizer_cls, kwargs = self.optimizer_cls_and_kwargs
                if "params" in kwargs:
                    raise ValueError(
                        "BlockwiseTrainer makes the parameter groups itself: give optimizer_cls_and_kwargs without "
                        "`params`, or pass blockwise_optimizer(...) to transformers.Trainer"
                    )
            else:
                optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, target)
            base = self.args.weight_decay
            given = base if self._weight_decay is None else self._weight_decay
            decays, decay = resolve_decay(given, self._decay, base)
            groups = param_groups(
                target,
                self.args.learning_rate,
                self._ratios,
                weight_decay=decays,
                no_decay=self._no_decay,
                decay=decay,
                blocks=resolve_blocks(target, self._blocks),
            )
            self.optimizer = optimizer_cls(groups, **kwargs)
            carry_over(self.optimizer, target, self._on_change, ratios_move=self._rule is not None)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The blockwise schedule on the optimizer's groups."""
        if self.lr_scheduler is None:
            inner = _torch_optimizer(self.optimizer if optimizer is None else optimizer)
            shape = self._choose_schedule()
            # Trainer annotates a LambdaLR; any LRScheduler does.
            if shape == "trainer":
                self.lr_scheduler = TrainerSchedule(  # type: ignore[assignment]
                    inner, self.args, num_training_steps, on_change=self._on_change
                )
            else:
                self.lr_scheduler = BlockwiseSchedule(  # type: ignore[assignment]
                    inner,
                    shape=shape,
                    warmup_steps=self.args.get_warmup_steps(num_training_steps),
                    total_steps=num_training_steps,
                    floor=self.args.learning_rate / 20 if self._floor is None else self._floor,
                    floor_mode=self._floor_mode,
                    warmup=self._warmup,
                    warmup_start=self._warmup_start,
                    on_change=self._on_change,
                )
            self._created_lr_scheduler = True
            if self._rule is not None:
                schedule = cast("BlockwiseSchedule", self.lr_scheduler)
                self._step_loss = None
                self.auto = AutoRatios(schedule.optimizer, schedule, self._rule)
        return cast("LRScheduler", self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Trainer records what loading warns of, and drops it.
        schedule = self.lr_scheduler if isinstance(self.lr_scheduler, BlockwiseSchedule) else None
        if schedule is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and isinstance(self.lr_scheduler, LambdaLR):
                take_new_peaks(self.lr_scheduler)
            return
        schedule.notes = []
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            notes = schedule.notes
        finally:
            schedule.notes = None
        if self.is_world_process_zero():
            for text in notes:
                self._tell(text)

    def _tell(self, text: str) -> None:
        warnings.warn(text, stacklevel=3)

    def _choose_schedule(self) -> ScheduleName:
        return choose_schedule(self._schedule, self.args, floor=self._floor, warmup=self._warmup)

    @property
    def _warns_of_gradients(self) -> bool:
        return self.accelerator.scaler is None and self.is_world_process_zero()  # fp16's scaling expects some

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the base learning rate and the learning rate of every block beside the loss."""
        if "loss" in logs:
            if self._lr_record.base is not None:
                logs["learning_rate"] = (
                    self._lr_record.base
                )  # Trainer's own is that of the first group, NORM's
            logs.update({f"lr/{block}": lr for block, lr in self._lr_record.by_block.items()})
            if self._clipping is not None:
                norms = self._clipping.read(warn=self._warns_of_gradients)
                logs.update({f"grad_norm/{block.value}": norm for block, norm in norms.items()})
            if self.auto is not None:
                logs.update({f"ratio/{block.value}": ratio for block, ratio in self.auto.ratios.items()})
        super().log(logs, start_time)


class _LearningRateRecord(TrainerCallback):
    """Remembers each block's learning rate as the update takes it, since the scheduler moves on before Trainer logs."""

    def __init__(self) -> None:
        self.base: float | None = None
        self.by_block: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.base = base_lr(kwargs["optimizer"], kwargs.get("lr_scheduler"))
        self.by_block = {g["block"]: float(g["lr"]) for g in kwargs["optimizer"].param_groups if "block" in g}


def _torch_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's wrapper: torch's schedulers patch ``step`` of what they are given."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        warnings.warn(
            f"{type(inner).__name__} is not a torch optimizer; its learning rates may not be scheduled",
            stacklevel=2,
        )
    return inner  # type: ignore[no-any-return]
