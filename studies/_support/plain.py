"""Train one arm with any optimizer, as a user's own loop would."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from arms import Arm
from shapes import build
from stacked import Text, rounded
from torch.optim import Optimizer
from transformers import PreTrainedModel


def train_plain(
    arm: Arm,
    text: Text,
    make_optimizer: Callable[[Arm, PreTrainedModel], Optimizer],
    *,
    rows: int = 16,
    points: int = 24,
    watch: Callable[[int, PreTrainedModel, Optimizer], None] | None = None,
) -> dict[str, Any]:
    """Train an arm to its end and return its result, with the keys of ``Stack.run``.

    Args:
        arm: what to train.
        text: the windows.
        make_optimizer: returns the optimizer; its groups have "block", and the schedule sets their "lr".
        rows: windows of one step.
        points: validation losses along the run.
        watch: called before every step and after the last, with the number of steps that have been taken.
    """
    model = build(arm.shape, seed=arm.seed)
    optimizer = make_optimizer(arm, model)
    order = text.order(arm.seed, arm.steps * rows)
    curve: list[list[float | None]] = []
    begun = time.monotonic()
    for step in range(arm.steps):
        if watch is not None:
            watch(step, model, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = arm.lr(group["block"], step)
        ids = torch.from_numpy(text.train[order[rows * step : rows * (step + 1)]].astype(np.int64))
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % max(1, arm.steps // points) == 0 and done < arm.steps:
            curve.append([done, rounded(loss_on(model, text.val, most=192, rows=rows))])
    if watch is not None:
        watch(arm.steps, model, optimizer)
    return {
        "arm": arm.to_dict(),
        "tune_loss": rounded(loss_on(model, text.tune, most=1024, rows=rows)),
        "val_loss": rounded(loss_on(model, text.val, most=1024, rows=rows)),
        "curve": curve,
        "seconds": round(time.monotonic() - begun, 1),
        "rows": rows,
    }


@torch.no_grad()
def loss_on(model: PreTrainedModel, windows: npt.NDArray[np.uint16], *, most: int, rows: int) -> float:
    """Return the mean loss in nats on at most that many windows, evenly spaced over the split."""
    count = min(most, len(windows))
    chosen = windows[np.arange(count) * len(windows) // count]
    total = 0.0
    for begin in range(0, count, rows):
        ids = torch.from_numpy(chosen[begin : begin + rows].astype(np.int64))
        total += float(model(input_ids=ids, labels=ids).loss) * len(ids)
    return total / count
