"""Assemble a run: Trainer's arguments, and the trainer with its model, data and optimizer settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from blockwise_lr.blocks import split_fused
from blockwise_lr.data.prepare import FixedWindows, TokenData, TrainingStream
from blockwise_lr.integrations.sharpness_callback import SharpnessCallback
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.checks import report_names
from blockwise_lr.train.compiled_layers import compile_layers
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.deferred_guard import DeferredGuard
from blockwise_lr.train.metrics import MetricsFile
from blockwise_lr.train.pretrain_trainer import PretrainTrainer
from blockwise_lr.train.run_optimizer import optimizer_of_run
from blockwise_lr.train.settings import Settings
from blockwise_lr.train.unmasked_attention import use_unmasked_attention


def training_arguments(config: TrainConfig, settings: Settings, out: Path) -> TrainingArguments:
    """Return Trainer's arguments. Building them starts torch.distributed under torchrun."""
    optim = config.optim
    data_seed = config.seed if config.data_seed is None else config.data_seed
    on_gpu = settings.device == "cuda"
    return TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=optim.base_lr,
        weight_decay=settings.optim.weight_decay,
        max_grad_norm=optim.clip,
        warmup_steps=settings.optim.warmup_steps,
        seed=data_seed,
        use_cpu=settings.device == "cpu",
        bf16=False,  # PretrainTrainer enters autocast by itself
        torch_compile=False,  # make_trainer compiles the layers
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},  # copies from pinned memory need not wait for the device
        tf32=False,  # PretrainTrainer enables TF32 by itself, for training steps only
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # the filter hides NaN losses
        logging_first_step=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps",
        save_steps=config.save_every or config.steps,
        save_total_limit=None,  # manifest.rotate deletes old checkpoints, once the new one is complete
        report_to=report_names(config) or "none",
        dataloader_drop_last=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )


def make_trainer(
    config: TrainConfig,
    settings: Settings,
    out: Path,
    arguments: TrainingArguments,
    data: TokenData,
    metrics: MetricsFile | None,
    sharpness: SharpnessCallback | None,
    guard: DeferredGuard,
) -> PretrainTrainer:
    """Build the trainer of a run, with its model, its data and its optimizer settings.

    Args:
        config: the run.
        settings: the typed values of `config`.
        out: the run's folder.
        arguments: the result of :func:`training_arguments`.
        data: the tokenized splits.
        metrics: the file that receives logged rows; None on all ranks but 0.
        sharpness: the callback that measures sharpness; None if the run does not measure.
        guard: handles losses and gradients that are not finite.
    """
    optim, context = config.optim, config.model.context
    sequences = config.batch_size * config.accumulation * arguments.world_size
    init_seed = config.seed if config.init_seed is None else config.init_seed
    model: PreTrainedModel = split_fused(build_model(config.model, seed=init_seed))
    use_unmasked_attention(model)
    if config.compile:
        compile_layers(model)
    trainer = PretrainTrainer(
        model=model,
        args=arguments,
        train_dataset=TrainingStream(data.train, context, arguments.seed, n_samples=config.steps * sequences),
        eval_dataset=FixedWindows(data.val, context, config.eval_tokens),
        processing_class=data.tokenizer,
        data_collator=default_data_collator,  # all windows have one length, so none needs padding
        optimizer_cls_and_kwargs=optimizer_of_run(optim),
        ratios=settings.optim.moving or settings.optim.ratios,
        schedule=optim.schedule,
        floor=optim.base_lr * optim.floor_fraction,
        floor_mode=optim.floor,
        warmup=optim.warmup,
        warmup_start=optim.warmup_start,
        weight_decay=settings.optim.weight_decay_by_block or None,
        no_decay=settings.optim.no_decay,
        decay=optim.decay,
        relative_to=settings.optim.relative_to,
        clip_by_block=settings.optim.clip_by_block,
        metrics=metrics,
        run_dir=out,
        keep_checkpoints=config.keep_checkpoints,
        tokens_per_step=sequences * context,
        autocast_bf16=settings.precision == "bf16",
        tf32=config.tf32,
        guard=guard,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_EvaluateAtTheEnd())
    trainer.add_callback(_OwnIntervals())
    if sharpness is not None:
        trainer.add_callback(sharpness)
    return trainer


class _OwnIntervals(TrainerCallback):
    """Use this command's intervals for logging, evaluation and saving. Trainer would restore the checkpoint's."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class _EvaluateAtTheEnd(TrainerCallback):
    """Log, evaluate and save at the last step, whatever the intervals are: its loss is the run's result."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True
