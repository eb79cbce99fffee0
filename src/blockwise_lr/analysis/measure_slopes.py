"""The work of `blockwise-lr sharpness RUN --directional`: which block limits the learning rate?"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from blockwise_lr.analysis.named_models import NamedModel
from blockwise_lr.blocks import split_fused
from blockwise_lr.directional.directional_figure import plot_directional
from blockwise_lr.directional.directional_measurement import measure_directional
from blockwise_lr.directional.directional_report import DirectionalReport
from blockwise_lr.directional.ratio_display import run_ratios
from blockwise_lr.directional.updates import READABLE
from blockwise_lr.errors import UserError
from blockwise_lr.files import write_json_atomic
from blockwise_lr.optim.set_lr import init_scale_of
from blockwise_lr.reason import reason
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.run_folder import changes_of, read_run_config
from blockwise_lr.train.run_optimizer import groups_of_run, optimizer_of_run, scheduled_lr
from blockwise_lr.train.settings import OptimSettings

RESULT, FIGURE = "directional.json", "directional.png"
OPTIMIZER = "optimizer.pt"  # the name that transformers' Trainer uses


def directional_reports(
    named: NamedModel,
    batches: Sequence[Any],
    device: str,
    show: Callable[[int | None, int], None],
) -> list[DirectionalReport]:
    """Measure every checkpoint of a run along the update of its saved optimizer.

    Args:
        named: the run.
        batches: the batches to measure on.
        device: the device to measure on.
        show: called with (step, number of batches done) for progress.

    Returns:
        One report per checkpoint, earliest first.

    Raises:
        UserError: `named` is not a run, a checkpoint has no optimizer, or its update cannot be measured.
    """
    if named.run is None:
        raise UserError(
            f"--directional measures along the optimizer's update, and {named.name} has no optimizer: "
            "expected the folder of a run, or one of its checkpoints"
        )
    latest, changes = read_run_config(named.run), changes_of(named.run)
    reports = []
    for step, load in named.models:
        train = _config_at(latest, changes, step or 0)
        settings = OptimSettings.of(train)
        model = split_fused(nn.Module.to(load(), device))
        optimizer = load_optimizer(train, model, named.run / f"checkpoint-{step}")
        if type(optimizer) in READABLE and step:
            # The schedule advanced after the last update, so restore the learning rates of that update.
            for group in optimizer.param_groups:
                factor = init_scale_of(group)
                peak, ratio = float(group["initial_lr"]) / factor, float(group["lr_ratio"]) / factor
                group["lr"] = factor * scheduled_lr(train, settings, step - 1, peak=peak, ratio=ratio)
        try:
            reports.append(
                measure_directional(model, optimizer, batches, step=step, on_batch=partial(show, step))
            )
        except ValueError as error:
            raise UserError(f"step {step}: {error}") from error
        del model, optimizer
        gc.collect()  # models hold reference cycles; without this, two would be in memory at once
    return reports


def _config_at(config: TrainConfig, changes: Sequence[Mapping[str, Any]], step: int) -> TrainConfig:
    """Return the configuration by which a run took its update number `step`.

    Args:
        config: the run's configuration, with its latest number of steps.
        changes: the changes of that number, earliest first, as :func:`changes_of` returns them.
        step: the number of the update.
    """
    for change in changes:
        if step <= change["at_step"]:
            return replace(config, steps=change["steps"][0])
    return config


def load_optimizer(config: TrainConfig, model: nn.Module, checkpoint: Path) -> Optimizer:
    """Return the optimizer of a run as it was at a checkpoint, on the run's parameter groups.

    Args:
        config: the configuration of the run.
        model: the model of the checkpoint, with its fused weights split.
        checkpoint: the folder of the checkpoint.

    Raises:
        UserError: the checkpoint holds no optimizer, or its optimizer has different groups.
    """
    kind, options = optimizer_of_run(config.optim)
    optimizer = kind(groups_of_run(config.optim, OptimSettings.of(config), model), **options)
    path = checkpoint / OPTIMIZER
    try:
        optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{checkpoint} holds no optimizer ({OPTIMIZER}): choose another checkpoint") from None
    except Exception as error:  # torch raises various errors for damaged files and for other optimizers
        raise UserError(
            f"{path} is not this model's optimizer: {reason(error)}; choose another checkpoint"
        ) from None
    return optimizer


def write_directional(reports: Sequence[DirectionalReport], out: Path, about: dict[str, Any]) -> None:
    """Write directional.json (the last report; the others under "earlier"; the ratios) and the figure."""
    *earlier, last = reports
    content = {**last.to_dict(), "about": about, "earlier": [each.to_dict() for each in earlier]}
    if (ratios := run_ratios(reports)) is not None:
        content["ratios"] = ratios.to_dict()
    write_json_atomic(out / RESULT, content)
    plot_directional(reports, out / FIGURE)
