"""What `blockwise-lr sharpness RUN --directional` does: which block holds the learning rate back?"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from blockwise_lr.analysis.named_models import Subject
from blockwise_lr.blocks import split_fused
from blockwise_lr.directional.directional_figure import plot_directional
from blockwise_lr.directional.directional_report import DirectionalReport
from blockwise_lr.directional.measuring import measure_directional
from blockwise_lr.directional.updates import READABLE
from blockwise_lr.errors import UserError
from blockwise_lr.files import write_json_atomic
from blockwise_lr.reason import reason
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.run_folder import read_run_config
from blockwise_lr.train.run_optimizer import groups_of_run, optimizer_of_run, scheduled_lr
from blockwise_lr.train.settings import OptimSettings

RESULT, FIGURE = "directional.json", "directional.png"
OPTIMIZER = "optimizer.pt"  # transformers.Trainer's name


def directional_reports(
    subject: Subject,
    batches: Sequence[Any],
    device: str,
    show: Callable[[int | None, int], None],
) -> list[DirectionalReport]:
    """Every checkpoint of the run, along the update of the optimizer that is saved in it; earliest first.

    Raises:
        UserError: not a run, a checkpoint without the optimizer, or nothing that can be measured.
    """
    if subject.run is None:
        raise UserError(
            f"--directional measures along the optimizer's update, and {subject.name} has no optimizer: "
            "expected the folder of a run, or one of its checkpoints"
        )
    train = read_run_config(subject.run)
    settings = OptimSettings.of(train)
    reports = []
    for step, load in subject.models:
        model = split_fused(nn.Module.to(load(), device))
        optimizer = load_optimizer(train, model, subject.run / f"checkpoint-{step}")
        if type(optimizer) in READABLE and step:
            # The schedule has stepped since the update that the state holds.
            for group in optimizer.param_groups:
                peak, ratio = float(group["initial_lr"]), float(group["lr_ratio"])
                group["lr"] = scheduled_lr(train, settings, step - 1, peak=peak, ratio=ratio)
        try:
            reports.append(
                measure_directional(model, optimizer, batches, step=step, on_batch=partial(show, step))
            )
        except ValueError as error:
            raise UserError(f"step {step}: {error}") from error
        del model, optimizer
        gc.collect()  # a model is a web of cycles: two would be in memory at once
    return reports


def load_optimizer(config: TrainConfig, model: nn.Module, checkpoint: Path) -> Optimizer:
    """The optimizer of a run as it was at a checkpoint, on the groups that it had.

    Args:
        config: the run's.
        model: the checkpoint's, split.
        checkpoint: its folder.

    Raises:
        UserError: the checkpoint holds no optimizer, or one of other groups.
    """
    kind, options = optimizer_of_run(config.optim)
    optimizer = kind(groups_of_run(config.optim, OptimSettings.of(config), model), **options)
    path = checkpoint / OPTIMIZER
    try:
        optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{checkpoint} holds no optimizer ({OPTIMIZER}): choose another checkpoint") from None
    except Exception as error:  # a damaged file, or another optimizer's: whatever torch raises
        raise UserError(f"{path} is not this model's optimizer: {reason(error)}") from None
    return optimizer


def write_directional(reports: Sequence[DirectionalReport], out: Path, about: dict[str, Any]) -> None:
    """directional.json of the last report, the others under "earlier"; and the figure."""
    *earlier, last = reports
    write_json_atomic(
        out / RESULT, {**last.to_dict(), "about": about, "earlier": [each.to_dict() for each in earlier]}
    )
    plot_directional(reports, out / FIGURE)
