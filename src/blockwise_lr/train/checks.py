"""Whether a configuration can be run: every number in range, none at odds with another."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from blockwise_lr.blocks import Block, split_fused
from blockwise_lr.directional.updates import READABLE
from blockwise_lr.errors import UserError
from blockwise_lr.experimental.auto_rule import parse_auto
from blockwise_lr.optim.block_values import digits, format_pairs, parse_pairs
from blockwise_lr.optim.clipping import resolve_max_norm
from blockwise_lr.optim.curves import block_lr
from blockwise_lr.optim.decay import NoDecay, check_weight_decays, resolve_decay
from blockwise_lr.optim.groups import param_groups
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.optim.warmup import warmup_in_steps
from blockwise_lr.optimizers.registry import optimizer_class, optimizer_entry, resolve_weight_decay
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import OptimConfig, TrainConfig
from blockwise_lr.train.ranges import check_ranges
from blockwise_lr.train.ratio_text import canonical_ratios, parse_ratios
from blockwise_lr.train.run_sharpness import check_measurements
from blockwise_lr.train.trackers import check_trackers
from blockwise_lr.train.trial_step import check_trial_step

_TF32_CAPABILITY = (8, 0)  # of a GPU


def check_config(config: TrainConfig) -> TrainConfig:
    """The configuration with "auto" and files resolved, so that it means the same on every reading.

    Raises:
        UserError: values out of range or at odds with each other; names them and says what was expected.
    """
    check_ranges(config)
    _check_optim(config)
    _check_model(config)
    check_trackers(report_names(config))
    check_measurements(config)
    optim = config.optim
    resolved = replace(
        optim,
        ratios=canonical_ratios(optim.ratios),
        weight_decay_by_block=format_pairs(parse_weight_decay(optim.weight_decay_by_block)),
        clip_by_block=spell_max_norm(parse_clip(optim.clip_by_block)),
    )
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    config = replace(config, device=device, precision=precision, optim=resolved)
    _check_tf32(config)
    return config


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


def _check_optim(config: TrainConfig) -> None:
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
    try:
        auto = parse_auto(optim.ratios)
        if optim.re_measure < 0 or (optim.re_measure and auto is None):
            raise ValueError(
                f"--re-measure is {optim.re_measure} with --ratios {optim.ratios}; expected 0, or a number of steps "
                "with --ratios auto"
            )
        check_optimizer(optim)
        if auto is not None and optimizer_entry(optim.optimizer).load() not in READABLE:
            raise ValueError(
                "--ratios auto reads the last update from the state of Adam, AdamW or Adam-mini; --optimizer is "
                f"{optim.optimizer}: give it ratios that do not move, such as measured"
            )
        parse_weight_decay(optim.weight_decay_by_block)
        parse_clip(optim.clip_by_block)
        for ratio in resolve_ratios(parse_ratios(optim.ratios)).values():
            if not math.isfinite(ratio * optim.base_lr):
                raise ValueError(
                    f"--base-lr {optim.base_lr:g} times a ratio of {ratio:g} is {ratio * optim.base_lr}; expected a "
                    "finite number: lower one of them"
                )
            scheduled_lr(config, 0, peak=ratio * optim.base_lr, ratio=ratio)
    except ValueError as error:
        raise UserError(_with_flag(str(error))) from None


def _with_flag(message: str) -> str:
    """A message about an argument of the library, with the flag that sets it in the place of its name.

    Example:
        >>> _with_flag("weight_decay is -1.0; expected 0 or above")
        '--weight-decay is -1.0; expected 0 or above'
    """
    named = re.match(r"(ratios|weight_decay|no_decay|decay)(?=:| is )", message)
    return f"--{named[1].replace('_', '-')}{message[named.end() :]}" if named else message


def check_optimizer(optim: OptimConfig) -> None:
    """Raises UserError: no such optimizer, one that `train` cannot run, or a setting that it does not take."""
    try:
        if reason := optimizer_entry(optim.optimizer).own_loop:
            raise UserError(f"--optimizer {optim.optimizer} cannot be trained by this command: {reason}")
        optimizer_of_run(optim)
        resolve_weight_decay(optim.optimizer, optim.weight_decay)
    except (ValueError, ImportError) as error:
        raise UserError(f"--{error}" if str(error).startswith("optimizer") else str(error)) from None


def optimizer_of_run(optim: OptimConfig) -> tuple[type[Optimizer], dict[str, Any]]:
    """Class and keyword arguments of a run's optimizer. Raises as :func:`optimizer_class`."""
    return optimizer_class(optim.optimizer, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)


def optimizer_notices(optim: OptimConfig) -> list[str]:
    """What a user who comes from AdamW should know of a run's settings before it starts, a line each."""
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


def _check_model(config: TrainConfig) -> None:
    """Build the model without its weights, its groups, and its optimizer, whose constructor checks what it is given."""
    try:
        with torch.device("meta"):
            model = split_fused(build_model(config.model, seed=0))
        groups = groups_of_run(config, model)
    except ValueError as error:
        raise UserError(_with_flag(str(error))) from None
    except RuntimeError as error:  # of sizes whose product no integer holds
        raise UserError(f"a model of these sizes cannot be built: {error}") from None
    cls, options = optimizer_of_run(config.optim)
    try:
        cls(groups, **options)
    except Exception as error:  # whatever the constructor of another package raises
        raise UserError(f"--optimizer {config.optim.optimizer} on this model: {error}") from None
    check_trial_step(config, lambda small: cls(groups_of_run(config, small), **options))


def groups_of_run(config: TrainConfig, model: nn.Module) -> list[dict[str, Any]]:
    """The parameter groups of a run, on its model. Raises ValueError as :func:`blockwise_lr.param_groups`."""
    optim = config.optim
    given = parse_weight_decay(optim.weight_decay_by_block)
    base = resolve_weight_decay(optim.optimizer, optim.weight_decay)
    return param_groups(
        model,
        optim.base_lr,
        parse_ratios(optim.ratios),
        weight_decay=resolve_decay(given, optim.decay, base)[0] if given else base,
        no_decay=parse_no_decay(optim.no_decay),
        decay=optim.decay,
    )


def report_names(config: TrainConfig) -> list[str]:
    """Where Trainer reports to; empty for "none"."""
    return [name.strip() for name in config.report_to.split(",") if name.strip() not in ("", "none")]


def parse_no_decay(text: str) -> NoDecay:
    """`OptimConfig.no_decay` as `param_groups` takes it."""
    return "1d" if text == "1d" else [block.strip() for block in text.split(",") if block.strip()]


def parse_weight_decay(text: str) -> dict[Block, float]:
    """`OptimConfig.weight_decay_by_block`: the blocks that are named.

    Raises:
        ValueError: no pairs, an unknown block, or a decay out of range.
    """
    name = "--weight-decay-by-block"
    return check_weight_decays(parse_pairs(text, name), name) if text else {}


def parse_clip(text: str) -> float | dict[Block, float] | None:
    """`OptimConfig.clip_by_block` as `clip_grad_norm_by_block` takes it; None: no clipping by block.

    Raises:
        ValueError: neither a number nor pairs, an unknown block, or a norm out of range.
    """
    name = "--clip-by-block"
    if not text:
        return None
    try:
        limit = float(text)
    except ValueError:
        return resolve_max_norm(parse_pairs(text, name), name)
    resolve_max_norm(limit, name)
    return limit


def spell_max_norm(max_norm: float | Mapping[Block, float] | None) -> str:
    """The inverse of :func:`parse_clip`, so that the same limits are the same configuration."""
    if max_norm is None:
        return ""
    return format_pairs(max_norm) if isinstance(max_norm, Mapping) else digits(max_norm)


def scheduled_lr(config: TrainConfig, step: int, *, peak: float, ratio: float) -> float:
    """The learning rate that the run's schedule gives a block for the update after `step` others.

    Raises:
        ValueError: a schedule that does not fit that block.
    """
    return block_lr(
        step,
        peak=peak,
        ratio=ratio,
        shape=config.optim.schedule,
        warmup_steps=warmup_steps(config),
        total_steps=config.steps,
        floor=config.optim.base_lr * config.optim.floor_fraction,
        floor_mode=config.optim.floor,
        warmup=config.optim.warmup,
        warmup_start=config.optim.warmup_start,
    )


def warmup_steps(config: TrainConfig) -> int:
    """Length of the warm-up in steps."""
    given = config.optim.warmup_steps
    if given is None:
        return round(config.optim.warmup_fraction * config.steps)
    return int(warmup_in_steps(given, config.steps))


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """What "auto" is here.

    Raises:
        UserError: "cuda" where torch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but torch sees no GPU here; use --device cpu, or install a CUDA build of torch"
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def resolve_precision(
    precision: Literal["auto", "fp32", "bf16"], device: Literal["cpu", "cuda"]
) -> Literal["fp32", "bf16"]:
    """Return what "auto" is on this device: bf16 where it has instructions for it, otherwise fp32.

    Emulated bf16 is far slower than fp32, as on a CPU with AVX2 alone.
    """
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # The question that torch's own compiler asks before it hands a bf16 product to oneDNN.
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
