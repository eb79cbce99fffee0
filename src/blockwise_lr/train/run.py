"""Run one training with transformers' Trainer: start it, resume it, or leave it alone if it is finished."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import TrainerCallback

from blockwise_lr.checkpoints.manifest import checkpoint_step
from blockwise_lr.data.prepare import FixedWindows, prepare_data
from blockwise_lr.data.shards import TokenShards
from blockwise_lr.errors import LostProcessError, NonFiniteLossError, Terminated, UserError
from blockwise_lr.files import make_folder
from blockwise_lr.locks import HeldError, take_lock
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.assembly import make_trainer, training_arguments
from blockwise_lr.train.checks import check_config
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.deferred_guard import DeferredGuard
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.evaluate_loss import evaluate_loss
from blockwise_lr.train.initial_rms import initial_scales_of
from blockwise_lr.train.lost_process import forget_report, is_lost_connection
from blockwise_lr.train.metrics import MetricsFile
from blockwise_lr.train.precision import describe_precision, precision_notices, precision_of_run
from blockwise_lr.train.quiet import quiet_libraries
from blockwise_lr.train.resuming import check_same_start
from blockwise_lr.train.run_folder import missing_paths, remove_created
from blockwise_lr.train.run_optimizer import optimizer_notices
from blockwise_lr.train.run_result import logged_val_loss, write_result
from blockwise_lr.train.run_sharpness import SHARPNESS, is_measured, sharpness_callback
from blockwise_lr.train.same_run import begin_run, finished_result, keep_original_warmup
from blockwise_lr.train.settings import Device, Settings
from blockwise_lr.train.sigterm import StopOnSigterm
from blockwise_lr.train.trackers import report_failures
from blockwise_lr.train.training_progress import TrainingProgress

_LOCK = ".lock"  # in the run's folder; rank 0 holds it until it exits


def train(
    config: TrainConfig,
    out: Path,
    *,
    command: str = "",
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train the run of `config` in the folder `out` to its last step, and return the content of result.json.

    If the folder holds an unfinished run of the same configuration, the run resumes from its newest complete
    checkpoint. On the CPU, every logged loss is then bit-equal to that of an uninterrupted run. A finished run is left
    alone.

    If only the number of steps differs, the run continues to the new number of steps, with the schedule for that
    number. ``changes`` in config.json and result.json records this.

    Under torchrun, every rank calls this function.

    Args:
        config: the configuration of the run.
        out: the run's folder, created if missing.
        command: the command line, recorded in config.json.
        console: prints progress. Default: a console on stderr.
        callbacks: further callbacks of the trainer. An exception that one of them raises ends the run unfinished.

    Returns:
        ``{"finished": True, "steps", "tokens", "terminal_val_loss", "terminal_tune_loss", "seconds"}``.

    Raises:
        UserError: the configuration, the data or the folder is not usable; the message says what to change.
        NonFiniteLossError: the loss or the gradient became NaN or infinite. result.json then has ``"diverged": true``.
            A later call on the same run raises the error again.
        Terminated: SIGTERM was received. A checkpoint was saved, and the run is not finished.
        LostProcessError: another process of the run has exited.
        StorageError: a file cannot be written.

    Example:
        >>> train(TrainConfig(steps=300), Path("runs/first"))["terminal_val_loss"]  # doctest: +SKIP
    """
    console = console or Console(stderr=True)
    notify = _main_process_printer(console)
    config = check_config(config)
    _refuse_fsdp(config)
    notices = [*optimizer_notices(config.optim), *precision_notices(config)]
    config = replace(config, optim=config.optim.resolved())
    created = missing_paths(out / _LOCK)
    make_folder(out)
    try:
        lock = take_lock(out / _LOCK) if _is_main() else None
    except HeldError as held:
        raise UserError(
            f"another process is training in {out}: wait for it, or choose another --out{held.advice}"
        ) from None
    if lock is not None:
        forget_report(out)
    try:
        config = keep_original_warmup(config, out, notify)
        result = finished_result(config, out)
        if result is not None:
            if result.get("diverged"):
                raise NonFiniteLossError(result["diverged_at_step"], **result.get("not_finite", {}))
            text = f"{out} holds this run, finished: nothing to do"
            if is_measured(config) and not (out / SHARPNESS).exists():
                text += f" (its sharpness was not measured: blockwise-lr sharpness {out} measures its checkpoints)"
            notify(text)
            return result
        for notice in notices:
            notify(notice)
        with precision_of_run(cast("Device", config.device)):
            return _train(config, out, command, console, notify, callbacks)
    except UserError:
        if _is_main():
            remove_created(created)
        raise
    finally:
        if lock is not None:
            lock.release()


def _main_process_printer(console: Console) -> Callable[[str], None]:
    """Return a function that prints one line on rank 0. Markup is off, because file names may have brackets."""

    def notify(text: str) -> None:
        if _is_main():
            console.print(text, highlight=False, soft_wrap=True, markup=False)

    return notify


def _refuse_fsdp(config: TrainConfig) -> None:
    """Raise UserError if FSDP is requested where it does not work.

    A run under FSDP cannot be resumed from its checkpoints. On the CPU, accelerate silently replaces FSDP by DDP.
    """
    requested = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes", "y", "t", "on")
    if not requested:
        return
    what = "FSDP was asked for (ACCELERATE_USE_FSDP, accelerate launch --use_fsdp)"
    if config.device == "cpu" or not torch.cuda.is_available():
        raise UserError(
            f"{what} and the device is the CPU, where accelerate runs DDP instead: start without it, for DDP, or train "
            "on GPUs"
        )
    if config.save_every:
        raise UserError(
            f"{what}, and checkpoints of a run under FSDP cannot be resumed: start without it, for DDP, train with the "
            "last checkpoint alone, --save-every 0, or shard in a loop of your own "
            "(blockwise_lr.checkpoints.sharded_folder)"
        )


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@quiet_libraries()
def _train(
    config: TrainConfig,
    out: Path,
    command: str,
    console: Console,
    notify: Callable[[str], None],
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    """Start or resume a run that is not finished, evaluate it at the end, and write its result.json."""
    settings = Settings.of(config)
    arguments = training_arguments(config, settings, out)  # starts torch.distributed under torchrun
    if arguments.n_gpu > 1:
        # Trainer would use nn.DataParallel on several GPUs, which multiplies the configured global batch.
        notify(
            f"{arguments.n_gpu} GPUs seen, one used; for all: "
            f"torchrun --nproc-per-node={arguments.n_gpu} -m blockwise_lr train ..."
        )
        arguments._n_gpu = 1
    progress = console.is_terminal and _is_main()
    data = prepare_data(
        config.data, vocab_size=config.model.vocab_size, context=config.model.context, progress=progress
    )
    sharpness = sharpness_callback(config, out, data.measure, processes=arguments.world_size)
    resume = begin_run(
        config,
        out,
        about={
            "command": command,
            "processes": arguments.world_size,
            "ratios": {b.value: r for b, r in resolve_ratios(settings.optim.ratios).items()},
            "initial_rms": {b.value: rms for b, rms in initial_scales_of(config.model).items()},
            "precision": describe_precision(settings, tf32=config.tf32),
            **describe_environment(settings.device),
            "data": data.describe(),
        },
        main=_is_main(),
        notify=notify,
    )
    check_same_start(resume, out)
    metrics = (
        MetricsFile(out / "metrics.jsonl", resume_step=checkpoint_step(resume) if resume else 0)
        if _is_main()
        else None
    )
    guard = DeferredGuard(config.optim.on_nonfinite, notify, skipped=metrics.skipped if metrics else 0)
    trainer = make_trainer(config, settings, out, arguments, data, metrics, sharpness, guard)
    report_failures(trainer)
    sigterm, progress_shown = StopOnSigterm(), TrainingProgress(trainer.tokens_per_step, console)
    trainer.add_callback(sigterm)
    if _is_main():
        trainer.add_callback(progress_shown)
    for callback in callbacks:
        trainer.add_callback(callback)

    def finish(**how_it_ended: Any) -> dict[str, Any]:
        return write_result(
            out,
            steps=config.steps,
            tokens_per_step=trainer.tokens_per_step,
            seconds=trainer.seconds,
            main=_is_main(),
            **how_it_ended,
        )

    def evaluated_on(split: TokenShards) -> float:
        windows = FixedWindows(split, config.model.context, config.eval_tokens)
        return evaluate_loss(cast("torch.nn.Module", trainer.model), windows, batch_size=config.batch_size)

    try:
        if resume and checkpoint_step(resume) == config.steps:
            # The run was killed between its last checkpoint and result.json: only the final evaluation is missing.
            trainer._load_from_checkpoint(str(resume))
            val_loss = logged_val_loss(out, config.steps)
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            val_loss = trainer.val_loss
        if sigterm.stopped_at is not None:
            raise Terminated(sigterm.stopped_at, out / f"checkpoint-{sigterm.stopped_at}")
        if val_loss is None:  # the user has removed a damaged metrics.jsonl
            val_loss = evaluated_on(data.val)
        tune_loss = evaluated_on(data.tune)
        if not math.isfinite(val_loss + tune_loss):
            raise NonFiniteLossError(config.steps)
    except NonFiniteLossError as error:
        finish(diverged=error)
        raise
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        sigterm.ignore()  # torchrun sends SIGTERM to the remaining processes, before they can report the failure
        raise LostProcessError from error
    finally:
        sigterm.close()
        progress_shown.close()
    return finish(val_loss=val_loss, tune_loss=tune_loss)
