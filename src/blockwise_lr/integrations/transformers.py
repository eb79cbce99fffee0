"""Blockwise learning rates in transformers' Trainer: a subclass, and an optimizer factory for the plain Trainer."""

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
    from transformers import PreTrainedModel, Trainer
except ModuleNotFoundError as error:
    raise explained(error, "BlockwiseTrainer and blockwise_optimizer need") from None

from blockwise_lr.fp32 import Fp32Settings
from blockwise_lr.integrations.carry_over import carry_over_moments, use_optimizer_peaks
from blockwise_lr.integrations.factory import blockwise_optimizer
from blockwise_lr.integrations.moving_ratios import MOVING_NAMES, MovingRatios, RatioMover, moving_rule
from blockwise_lr.integrations.scales_at_start import Blocks, ScalesAtStart
from blockwise_lr.integrations.sharpness_callback import SharpnessCallback
from blockwise_lr.integrations.trainable import CheckTrainable
from blockwise_lr.integrations.trainer_clipping import TrainerClipping, check_engine, hides_parameters
from blockwise_lr.integrations.trainer_optimizer import (
    check_optimizer,
    choose_optimizer,
    keep_embeddings_in_32_bits,
)
from blockwise_lr.integrations.trainer_schedules import ScheduleName
from blockwise_lr.integrations.trainer_settings import LearningRateRecord, TrainerSettings
from blockwise_lr.optim import DEFAULT_RATIOS, BlockwiseSchedule, Ratios
from blockwise_lr.optim.clipping import MaxNorm
from blockwise_lr.optim.curves import FloorMode, WarmupMode, WarmupStart
from blockwise_lr.optim.decay import Decay, NoDecay, WeightDecay
from blockwise_lr.optim.initial_scales import RelativeTo
from blockwise_lr.optim.ratios import given_ratios
from blockwise_lr.optim.saved_groups import OnChange

__all__ = ["BlockwiseTrainer", "SharpnessCallback", "blockwise_optimizer"]


class BlockwiseTrainer(Trainer):
    """transformers' Trainer with a learning rate and a schedule per block.

    The base learning rate, weight decay, betas, warm-up and clipping are Trainer's own arguments: ``learning_rate``,
    ``weight_decay``, ``adam_beta1`` ..., ``warmup_steps`` and ``max_grad_norm``. ``optim`` selects the optimizer.

    The log contains the learning rate that each block had in the logged step, as ``lr/<block>``. ``learning_rate`` in
    the log is the base learning rate of that step, which is that of a block with ratio 1. The measurements of a
    :class:`SharpnessCallback` among the callbacks are logged as well.

    Args:
        ratios: learning-rate ratio by block, or one of the names "half", "measured", "paper", "uniform" and "auto".
            With an :class:`blockwise_lr.AutoRule` ("auto"), the run determines the ratios itself; see :attr:`auto`.
            Default: "half", which is :data:`blockwise_lr.DEFAULT_RATIOS`. It takes a tuned uniform learning rate as
            ``learning_rate``.
        schedule: "cosine" or "wsd" for this library's schedules (:func:`blockwise_lr.cosine_schedule`,
            :func:`blockwise_lr.wsd_schedule`), or "trainer" for the schedule that ``args.lr_scheduler_type`` and
            ``args.lr_scheduler_kwargs`` select. With "trainer", every block gets its ratio times the learning rate of
            that schedule, until the end of the run. Default: None, which means "trainer" if one of these two arguments
            differs from its default ("linear", no kwargs), and "cosine" otherwise. To use "linear", set
            ``schedule="trainer"``.
        floor: final learning rate of a block with ratio 1, for this library's schedules only.
            Default: learning_rate / 20.
        floor_mode, warmup, warmup_start: as in :func:`blockwise_lr.cosine_schedule`.
        on_change: what to do if a run resumes from a checkpoint with another base learning rate, other ratios or
            other groups. "error" (default) raises ValueError, which names the difference. "use_new" loads only the
            optimizer's moments and keeps the settings of this trainer. A different number of steps is no error: the
            run follows this trainer's schedule, and a warning names the change.
        weight_decay: as in :func:`blockwise_lr.param_groups`, but ``args.weight_decay`` replaces its default value of
            0.1. Default: ``args.weight_decay`` for all blocks.
        no_decay, decay: as in :func:`blockwise_lr.param_groups`. Unlike in Trainer, norms and biases are decayed by
            default, as in the paper.
        relative_to: as in :func:`blockwise_lr.param_groups`. "init" measures the model when the trainer is made, with
            the adapters that it adds. When a run resumes, the scales that its checkpoint holds are used.
        clip_by_block: largest gradient norm of each block, as ``max_norm`` of
            :func:`blockwise_lr.clip_grad_norm_by_block`. It replaces ``max_grad_norm``, which is then ignored. The
            norm of every block is logged as ``grad_norm/<block>``. If a gradient is not finite, a warning names the
            step, blocks and parameters. Under fp16 there is no warning, because loss scaling produces such gradients.
            Default: None, which keeps Trainer's own clipping.
        blocks: a BlockMap, if the model needs overrides. If adapters are added later, give a function that builds the
            BlockMap from the model that is trained. Default: ``classify(model)``.
        optimizer_cls_and_kwargs: the optimizer class and its keyword arguments without ``params``, for an optimizer
            that ``args.optim`` cannot name.

    Raises:
        ValueError: ``optimizers`` is given, although this class builds both; the optimizer makes its own parameter
            groups (GaLore, APOLLO, LOMO) or comes from a factory; `clip_by_block` is out of range, or is
            used with DeepSpeed, FSDP version 1 or XLA; `schedule` and ``lr_scheduler_type`` contradict each other;
            ``lr_scheduler_kwargs`` would have no effect; or the schedule is not a function of the step
            (``reduce_lr_on_plateau``, ``greedy``). Also the errors of :func:`blockwise_lr.param_groups`, such as for a
            fused QKV weight that is not split (call ``split_fused(model)`` first). ``train()`` raises it at the first
            step if the optimizer's parameters are not the trainable ones of the model.

    To combine this class with another subclass of Trainer, inherit from both:
    ``class SFT(BlockwiseTrainer, SFTTrainer)``.

    Unlike in Trainer, ``torch_compile`` does not switch TF32 on; set ``tf32=True`` in the arguments for that.

    :attr:`auto` is closed when ``train()`` ends, also after an error or Ctrl-C. Its ratios remain readable.

    Example:
        >>> trainer = BlockwiseTrainer(split_fused(model), args, train_dataset=data)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        ratios: Ratios = DEFAULT_RATIOS,
        schedule: ScheduleName | None = None,
        floor: float | None = None,
        floor_mode: FloorMode = "shared",
        warmup: WarmupMode = "shared",
        warmup_start: WarmupStart = "above_zero",
        on_change: OnChange = "error",
        weight_decay: WeightDecay | None = None,
        no_decay: NoDecay = (),
        decay: Decay = "coupled",
        relative_to: RelativeTo = None,
        clip_by_block: MaxNorm | None = None,
        blocks: Blocks = None,
        **kwargs: Any,
    ) -> None:
        # Without this check, an old version of transformers fails only at the first step.
        check("BlockwiseTrainer needs", ["transformers"])
        if any(given is not None for given in kwargs.get("optimizers", ())):
            raise ValueError(
                "BlockwiseTrainer makes the optimizer and the scheduler itself: leave out `optimizers`, or use "
                "transformers.Trainer with param_groups(...) and cosine_schedule(...) of your own"
            )
        rule = moving_rule(ratios)
        self._moving = None if rule is None else MovingRatios(rule)
        self._settings = TrainerSettings(
            ratios=given_ratios(rule or ratios, more=MOVING_NAMES),
            schedule=schedule,
            floor=floor,
            floor_mode=floor_mode,
            warmup=warmup,
            warmup_start=warmup_start,
            on_change=on_change,
            weight_decay=weight_decay,
            no_decay=no_decay,
            decay=decay,
            blocks=blocks,
        )
        self._clipping = None if clip_by_block is None else TrainerClipping(clip_by_block)
        before = Fp32Settings.now()
        try:
            super().__init__(*args, **kwargs)
            # Report contradictory settings before the data is loaded.
            check_optimizer(self.args, self.optimizer_cls_and_kwargs)
            self._settings.choose_schedule(self.args)
        finally:
            before.restore()  # accelerate also switches TF32 on for torch_compile
        self._scales = ScalesAtStart(relative_to, cast("nn.Module", self.model), blocks)
        if self.args.torch_compile and self.args.tf32 is None and before.root == "tf32":
            # TrainingArguments switched TF32 on for torch_compile, before this constructor was called.
            replace(before, root="none").restore()
        if self._clipping is not None:
            check_engine(self.accelerator.distributed_type, fsdp2=self.accelerator.is_fsdp2)
        self._lr_record = LearningRateRecord()
        self.add_callback(self._lr_record)
        hidden = hides_parameters(self.accelerator.distributed_type, fsdp2=self.accelerator.is_fsdp2)
        self.add_callback(CheckTrainable(lambda: cast("nn.Module", self.model), skip=hidden))

    @property
    def auto(self) -> RatioMover | None:
        """The object that changes the ratios during training; None for fixed ratios and before training."""
        return None if self._moving is None else self._moving.mover

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, and remove all hooks at the end, also after an error or Ctrl-C."""
        self._attach_callbacks()
        try:
            return super().train(*args, **kwargs)
        finally:
            for each in self._sharpness_callbacks():
                each.detach()
            if self._moving is not None:
                self._moving.stop()
            if self._clipping is not None:  # steps after the last log entry may need a warning
                self._clipping.read(warn=self._warns_of_gradients)

    def add_callback(self, callback: Any) -> None:
        """Add a callback as Trainer does, and connect a :class:`SharpnessCallback` to this trainer."""
        super().add_callback(callback)
        self._attach_callbacks()  # also connects those given to the constructor

    def _attach_callbacks(self) -> None:
        for each in self._sharpness_callbacks():
            each.attach(self.log, self.compute_loss_context_manager)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run Trainer's step on a micro-batch. After the last one of a step, measure from the unclipped gradients."""
        loss = super().training_step(*args, **kwargs)
        if self._moving is not None:
            self._moving.add_loss(loss)
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler  # only fp16 has one
            for each in self._sharpness_callbacks():
                each.gradients(self.state, self.control, scale=scaler.get_scale() if scaler else 1.0)
            if self._moving is not None:
                self._moving.end_step(
                    self.state.global_step, lambda total: self.accelerator.reduce(total, "mean")
                )
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | None:
        # Trainer calls this only if max_grad_norm is above 0, so clipping by block happens in _get_grad_norm.
        return super()._clip_grad_norm(model) if self._clipping is None else None  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self._clipping is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        self.accelerator.unscale_gradients()  # has an effect under fp16 only
        optimizer = cast("Optimizer", self.optimizer)
        return self._clipping.clip(model, optimizer.param_groups, self.state.global_step)

    def _sharpness_callbacks(self) -> list[SharpnessCallback]:
        return [each for each in self.callback_handler.callbacks if isinstance(each, SharpnessCallback)]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Build the optimizer that ``args.optim`` names (AdamW by default) on blockwise parameter groups."""
        if self.optimizer is None:
            target = cast("PreTrainedModel", self.model if model is None else model)
            optimizer_cls, kwargs = choice = choose_optimizer(self, target)
            self.optimizer = optimizer_cls(self._settings.groups(target, self.args, self._scales), **kwargs)
            keep_embeddings_in_32_bits(choice, target)
            carry_over_moments(
                self.optimizer, target, self._settings.on_change, ratios_move=self._moving is not None
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Build the blockwise schedule of the optimizer's groups."""
        if self.lr_scheduler is None:
            built = self._settings.make_schedule(
                self.optimizer if optimizer is None else optimizer, self.args, num_training_steps
            )
            self.lr_scheduler = built  # type: ignore[assignment]  # Trainer annotates a LambdaLR
            self._created_lr_scheduler = True
            if self._moving is not None:
                self._moving.start(built)
        return cast("LRScheduler", self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Trainer swallows warnings during loading, so the schedule collects its notes for a warning afterwards.
        schedule = self.lr_scheduler if isinstance(self.lr_scheduler, BlockwiseSchedule) else None
        if schedule is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and isinstance(self.lr_scheduler, LambdaLR):
                use_optimizer_peaks(self.lr_scheduler)
            return
        schedule.notes = []
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            notes = schedule.notes
        finally:
            schedule.notes = None
        if self.is_world_process_zero():
            for text in notes:
                self._warn(text)

    def _warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=3)

    @property
    def _warns_of_gradients(self) -> bool:
        # fp16 loss scaling produces some gradients that are not finite, which need no warning.
        return self.accelerator.scaler is None and self.is_world_process_zero()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, and add learning rates, gradient norms and ratios by block to entries with a loss."""
        if "loss" in logs:
            if self._lr_record.base is not None:
                # Trainer would log the learning rate of the first group, NORM.
                logs["learning_rate"] = self._lr_record.base
            logs.update({f"lr/{block}": lr for block, lr in self._lr_record.by_block.items()})
            if self._clipping is not None:
                norms = self._clipping.read(warn=self._warns_of_gradients)
                logs.update({f"grad_norm/{block.value}": norm for block, norm in norms.items()})
            if self._moving is not None:
                logs.update(self._moving.logged())
        super().log(logs, start_time)
