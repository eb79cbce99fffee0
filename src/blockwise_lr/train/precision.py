"""The precision of a run: set while the run lasts, and recorded in config.json."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.settings import Device, Settings

_MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
"""The variable in which `accelerate launch` passes its --mixed_precision on to Trainer."""


@contextmanager
def precision_of_run(device: Device) -> Iterator[None]:
    """Use full fp32 and no autocast in this block, and restore what the process has set, also after an error.

    PretrainTrainer enters TF32 and autocast itself, in training steps alone. The mixed precision of `accelerate launch`
    has no effect: it would also reach the evaluation, and keep the weights that autocast has cast in the first step.

    Args:
        device: the device that trains.
    """
    asked = os.environ.get(_MIXED_PRECISION)
    os.environ[_MIXED_PRECISION] = "no"
    try:
        with fp32_precision("ieee"), torch.autocast(device, enabled=False):
            yield
    finally:
        del os.environ[_MIXED_PRECISION]
        if asked is not None:
            os.environ[_MIXED_PRECISION] = asked


def precision_notices(config: TrainConfig) -> list[str]:
    """Return one line if `accelerate launch` asks for another precision than that of the run, which is resolved."""
    asked = os.environ.get(_MIXED_PRECISION, "no")
    if asked in ("no", "", config.precision):
        return []
    return [
        f"accelerate's mixed precision, {asked}, has no effect: this run trains in {config.precision}, as --precision "
        "sets it"
    ]


def describe_precision(settings: Settings, *, tf32: bool) -> dict[str, Any]:
    """Return the precision of a run's computations, for config.json.

    Args:
        settings: the typed values of the run's configuration.
        tf32: whether training steps compute fp32 products in TF32.

    Returns:
        For training steps and for evaluation: "matmul", the precision of fp32 products ("ieee" or "tf32"), and
        "autocast", the dtype of autocast or None.
    """
    autocast = "bfloat16" if settings.precision == "bf16" else None
    return {
        "training": {"matmul": "tf32" if tf32 else "ieee", "autocast": autocast},
        "evaluation": {"matmul": "ieee", "autocast": None},
    }
