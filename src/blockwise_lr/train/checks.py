"""Check that a configuration can be run: every number in range, and no two fields in conflict."""

from __future__ import annotations

import math
import re

import torch

from blockwise_lr.blocks import split_fused
from blockwise_lr.directional.updates import READABLE
from blockwise_lr.errors import UserError
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.optimizers.registry import optimizer_entry, resolve_weight_decay
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import OptimConfig, TrainConfig
from blockwise_lr.train.ranges import check_ranges
from blockwise_lr.train.run_optimizer import groups_of_run, optimizer_of_run, scheduled_lr
from blockwise_lr.train.run_sharpness import check_measurements
from blockwise_lr.train.settings import OptimSettings, Settings
from blockwise_lr.train.trackers import check_trackers
from blockwise_lr.train.trial_step import check_trial_step

_TF32_CAPABILITY = (8, 0)
"""The lowest compute capability of a GPU that has TF32."""


def check_config(config: TrainConfig) -> TrainConfig:
    """Check a configuration, and return it with "auto" fields and files resolved.

    The result means the same on every machine and reading, so it is what config.json records.

    Raises:
        UserError: a value is out of range or in conflict with another; names the flag and what was expected.
    """
    check_ranges(config)
    settings = _check_settings(config)
    _check_model(config, settings.optim)
    check_trackers(report_names(config))
    check_measurements(config)
    resolved = settings.spell(config)
    _check_tf32(resolved)
    return resolved


def _check_tf32(config: TrainConfig) -> None:
    if not config.tf32:
        return
    if config.precision != "fp32":
        raise UserError(
            f"--tf32 is about products in fp32, and --precision is {config.precision}: add --precision fp32, or leave "
            "--tf32 out"
        )
    if config.device == "cpu" or torch.cuda.get_device_capability() < _TF32_CAPABILITY:
        raise UserError(
            "--tf32 needs a GPU of compute capability 8.0 or higher (A100 and later), and the run has none: leave it "
            "out"
        )


def _check_settings(config: TrainConfig) -> Settings:
    """Check the optimizer's fields, and return the configuration's typed values."""
    optim = config.optim
    if not (math.isfinite(optim.base_lr) and optim.base_lr > 0):
        raise UserError(f"--base-lr is {optim.base_lr}; expected a finite number above 0")
    if not 0 <= optim.floor_fraction <= 1:
        raise UserError(
            f"--floor-fraction is {optim.floor_fraction}; expected 0 to 1: the floor cannot be above the base LR"
        )
    for name, share in {
        "warmup-fraction": optim.warmup_fraction,
        "beta1": optim.beta1,
        "beta2": optim.beta2,
    }.items():
        if share is not None and not 0 <= share < 1:
            raise UserError(f"--{name} is {share}; expected 0 or more and below 1")
    if optim.eps is not None and not (math.isfinite(optim.eps) and optim.eps > 0):
        raise UserError(f"--eps is {optim.eps}; expected a finite number above 0")
    check_optimizer(optim)
    try:
        settings = Settings.of(config)
        if settings.optim.moving is not None and optimizer_entry(optim.optimizer).load() not in READABLE:
            raise ValueError(
                "--ratios auto reads the last update from the state of Adam, AdamW or Adam-mini; --optimizer is "
                f"{optim.optimizer}: give it ratios that do not move, such as measured"
            )
        for ratio in resolve_ratios(settings.optim.ratios).values():
            if not math.isfinite(ratio * optim.base_lr):
                raise ValueError(
                    f"--base-lr {optim.base_lr:g} times a ratio of {ratio:g} is {ratio * optim.base_lr}; expected a "
                    "finite number: lower one of them"
                )
            scheduled_lr(config, settings.optim, 0, peak=ratio * optim.base_lr, ratio=ratio)
    except ValueError as error:
        raise UserError(_with_flag(str(error))) from None
    return settings


def _with_flag(message: str) -> str:
    """Replace the name of a library argument at the start of a message by the flag that sets it.

    Example:
        >>> _with_flag("weight_decay is -1.0; expected 0 or above")
        '--weight-decay is -1.0; expected 0 or above'
    """
    named = re.match(r"(ratios|relative_to|weight_decay|no_decay|decay)(?=:| is )", message)
    return f"--{named[1].replace('_', '-')}{message[named.end() :]}" if named else message


def check_optimizer(optim: OptimConfig) -> None:
    """Check that `train` can run the optimizer with its settings.

    Raises:
        UserError: the optimizer is unknown, `train` cannot run it, or it does not take a setting.
    """
    try:
        if reason := optimizer_entry(optim.optimizer).own_loop:
            raise UserError(f"--optimizer {optim.optimizer} cannot be trained by this command: {reason}")
        optimizer_of_run(optim)
        resolve_weight_decay(optim.optimizer, optim.weight_decay)
    except (ValueError, ImportError) as error:
        raise UserError(f"--{error}" if str(error).startswith("optimizer") else str(error)) from None


def _check_model(config: TrainConfig, settings: OptimSettings) -> None:
    """Build the model on the meta device, its groups and its optimizer, whose constructor checks its arguments."""
    optim = config.optim
    try:
        with torch.device("meta"):
            model = split_fused(build_model(config.model, seed=0))
        groups = groups_of_run(optim, settings, model)
    except ValueError as error:
        raise UserError(_with_flag(str(error))) from None
    except RuntimeError as error:  # the product of the sizes overflows an integer
        raise UserError(f"a model of these sizes cannot be built: {error}") from None
    cls, options = optimizer_of_run(optim)
    try:
        cls(groups, **options)
    except Exception as error:  # third-party constructors raise errors of any class
        raise UserError(f"--optimizer {optim.optimizer} on this model: {error}") from None
    check_trial_step(config, lambda small: cls(groups_of_run(optim, settings, small), **options))


def report_names(config: TrainConfig) -> list[str]:
    """Return the names of the trackers that Trainer reports to; an empty list for "none"."""
    return [name.strip() for name in config.report_to.split(",") if name.strip() not in ("", "none")]
