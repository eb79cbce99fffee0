"""The precision of a run: set while the run lasts, and recorded in config.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.train.settings import Device, Settings


@contextmanager
def precision_of_run(device: Device) -> Iterator[None]:
    """Use full fp32 and no autocast in this block, and restore what the process has set, also after an error.

    PretrainTrainer enters TF32 and autocast itself, in training steps alone.

    Args:
        device: the device that trains.
    """
    with fp32_precision("ieee"), torch.autocast(device, enabled=False):
        yield


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
