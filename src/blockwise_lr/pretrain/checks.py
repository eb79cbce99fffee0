"""Whether a configuration can be run: every number in range, none at odds with another."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch

from blockwise_lr.errors import UserError
from blockwise_lr.optim.ratios import NAMED_RATIOS, parse_ratios, spell_ratios
from blockwise_lr.optim.registry import optimizer_class
from blockwise_lr.optim.schedules import cosine, wsd
from blockwise_lr.pretrain.config import TrainConfig


def check_config(config: TrainConfig) -> TrainConfig:
    """The configuration with "auto" and files resolved, so that it means the same on every reading.

    Raises:
        UserError: values out of range or at odds with each other; names them and says what was expected.
    """
    at_least_one = {
        "steps": config.steps,
        "batch-size": config.batch_size,
        "accumulation": config.accumulation,
        "log-every": config.log_every,
        "keep-checkpoints": config.keep_checkpoints,
        "layers": config.model.layers,
        "heads": config.model.heads,
        "hidden-size": config.model.hidden_size,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise UserError(f"--{name} is {value}; expected 1 or more")
    if config.model.context < 2:
        raise UserError(
            f"--context is {config.model.context}; expected 2 or more, so that there is a token to predict"
        )
    for name, value in {"save-every": config.save_every, "eval-every": config.eval_every}.items():
        if value < 0 or value % config.log_every:
            # A resumed run's first logged loss is a mean over the steps since the checkpoint.
            raise UserError(
                f"--{name} is {value}; expected 0 or a multiple of --log-every ({config.log_every})"
            )
    optim = config.optim
    if not (math.isfinite(optim.base_lr) and optim.base_lr > 0):
        raise UserError(f"--base-lr is {optim.base_lr}; expected a finite number above 0")
    if not 0 <= optim.floor_fraction <= 1:
        raise UserError(
            f"--floor-fraction is {optim.floor_fraction}; expected 0 to 1: the floor cannot be above the base LR"
        )
    if not 0 <= optim.warmup_fraction < 1:
        raise UserError(f"--warmup-fraction is {optim.warmup_fraction}; expected 0 or more and below 1")
    try:
        ratios = parse_ratios(optim.ratios)
        optimizer_class(optim.optimizer)
        for ratio in ratios.values():
            peak, floor = ratio * optim.base_lr, optim.base_lr * optim.floor_fraction * min(ratio, 1.0)
            warmup = warmup_steps(config) * (ratio if optim.warmup == "equal_slope" else 1.0)
            if optim.schedule == "cosine":
                cosine(0, peak=peak, warmup_steps=warmup, total_steps=config.steps, floor=floor)
            else:
                wsd(
                    0,
                    peak=peak,
                    base=optim.base_lr,
                    warmup_steps=warmup,
                    total_steps=config.steps,
                    floor=floor,
                )
    except ValueError as error:
        raise UserError(str(error)) from None
    spelled = optim.ratios if optim.ratios in NAMED_RATIOS else spell_ratios(ratios)
    return replace(config, device=_resolve_device(config), optim=replace(optim, ratios=spelled))


def warmup_steps(config: TrainConfig) -> int:
    """Length of the warm-up in steps."""
    given = config.optim.warmup_steps
    return round(config.optim.warmup_fraction * config.steps) if given is None else given


def _resolve_device(config: TrainConfig) -> Literal["cpu", "cuda"]:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but torch sees no GPU here; use --device cpu, or install a CUDA build of torch"
        )
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device
