"""Train one arm, and measure sharpness along its run: the library's groups, schedule and estimators."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from arms import ROWS, SHAPES, Arm, build
from images import Images, Split
from torch import nn
from torch.nn import functional

from blockwise_lr import classify, cosine_schedule, measure_directional, measure_sharpness, param_groups

WATCHED_AT = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Where a watched run is measured, as shares of its steps."""

PROBES = {"fisher": 1, "hutchinson": 4}
"""The estimators of sharpness, and their draws for each batch: the Hessian's trace varies more between draws."""
_BATCHES = 8  # of each measurement; twice as many for fisher, which is cheap
_LOGGED = 25  # times a run


def run(arm: Arm, images: Images, *, rows: int = ROWS, batches: int = _BATCHES) -> dict[str, Any]:
    """Train an arm to its end.

    Args:
        arm: the run.
        images: the data.
        rows: images in one step and in one measured batch.
        batches: batches of each measurement, if the arm is watched.

    Returns:
        The arm, its losses and accuracies on `tune` and `val` (None if it diverged), the training loss along the run,
        the measurements along the run, the sizes of the blocks, and the seconds that it took.
    """
    started = time.monotonic()
    model = build(SHAPES[arm.shape], arm.seed).train()
    blocks = classify(model)
    groups = param_groups(model, arm.base_lr, arm.ratios, weight_decay=arm.weight_decay, blocks=blocks)
    optimizer = torch.optim.AdamW(groups, lr=arm.base_lr, betas=(0.9, arm.beta2), fused=True)
    schedule = cosine_schedule(
        optimizer,
        warmup_steps=round(arm.warmup * arm.steps),
        total_steps=arm.steps,
        floor=arm.base_lr / 20,
    )
    watched = {round(share * arm.steps) for share in WATCHED_AT} if arm.watched else set()
    measurements: list[dict[str, Any]] = []
    curve: list[tuple[int, float]] = []
    losses: list[float] = []
    order = images.order(arm.seed, arm.steps * rows).reshape(arm.steps, rows)
    for step in range(arm.steps + 1):
        if step in watched:
            measurements.append(_measure(model, optimizer, images, step, rows, batches))
        if step == arm.steps:
            break
        inputs, labels = images.batch(images.train, order[step])
        loss = functional.cross_entropy(_logits(model, inputs), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if (step + 1) % max(1, arm.steps // _LOGGED) == 0:
            curve.append((step + 1, round(sum(losses) / len(losses), 5)))
            losses = []
    result: dict[str, Any] = {"arm": arm.to_dict(), "curve": curve}
    for name, split in (("tune", images.tune), ("val", images.val)):
        result[f"{name}_loss"], result[f"{name}_accuracy"] = evaluate(model, images, split)
    return {
        **result,
        "measurements": measurements,
        "blocks": {block.value: numel for block, numel in blocks.counts().items()},
        "seconds": round(time.monotonic() - started, 1),
    }


def evaluate(model: nn.Module, images: Images, split: Split) -> tuple[float | None, float | None]:
    """Return the mean cross-entropy of a split and the share that is classified right; None if not finite."""
    model.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for inputs, labels in images.batches(split, 250):
            logits = _logits(model, inputs)
            loss += functional.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(-1) == labels).sum())
    model.train()
    if not math.isfinite(loss):
        return None, None
    return round(loss / len(split), 6), round(right / len(split), 6)


def _measure(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Images, step: int, rows: int, count: int
) -> dict[str, Any]:
    """Return the sharpness of each block by both estimators, and the directional report, on the `measure` split."""
    batches = list(images.batches(images.measure, rows, 2 * count))
    found: dict[str, Any] = {"step": step}
    for estimator, probes in PROBES.items():
        chosen = batches if probes == 1 else batches[:count]
        report = measure_sharpness(model, chosen, estimator=estimator, probes=probes, step=step)  # type: ignore[arg-type]
        found[estimator] = {
            block.value: [_short(each.mean), _short(each.stderr)] for block, each in report.items()
        }
    if step:  # before the first step there is no update to measure along
        found["directional"] = _rounded(
            measure_directional(model, optimizer, batches[:count], step=step).to_dict()
        )
    return found


def _logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    output = model(inputs)
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _rounded(value: Any) -> Any:
    """Return values for JSON with six digits: a third of the size."""
    if isinstance(value, float):
        return _short(value)
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
