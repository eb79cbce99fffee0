"""result.json: the last file of a run, whose presence means that the run is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockwise_lr.errors import NonFiniteLossError, UserError
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.run_folder import CHANGES, RESULT, changes_of, read_object


def read_result(out: Path) -> dict[str, Any]:
    """Return the content of the result.json in `out`.

    Raises:
        UserError: it cannot be read, or lacks a number.
    """
    result = read_object(out / RESULT)
    named = (
        ("diverged_at_step",)
        if result.get("diverged")
        else ("terminal_val_loss", "terminal_tune_loss", "seconds")
    )
    for name in ("steps", *named):
        if isinstance(result.get(name), bool) or not isinstance(result.get(name), (int, float)):
            raise UserError(
                f"{out / RESULT} has {result.get(name)!r} as its {name}; expected a number: remove it, and the run is "
                "finished again from its last checkpoint"
            )
    return result


def logged_val_loss(out: Path, step: int) -> float | None:
    """Return the validation loss that metrics.jsonl has for a step; None if the row is missing or has none."""
    rows = read_metrics(out / "metrics.jsonl")
    return next((row.get("val_loss") for row in rows if row["step"] == step), None)


def write_result(
    out: Path,
    *,
    steps: int,
    tokens_per_step: int,
    seconds: float,
    main: bool,
    val_loss: float | None = None,
    tune_loss: float | None = None,
    diverged: NonFiniteLossError | None = None,
) -> dict[str, Any]:
    """Write result.json and return its content. The losses of a diverged run are null.

    Args:
        out: the run's folder.
        steps: optimizer steps of the run.
        tokens_per_step: tokens in one optimizer step, over all ranks.
        seconds: seconds that the run has taken.
        main: whether this process writes, which rank 0 alone does.
        val_loss: the loss on the validation windows; None if the run diverged.
        tune_loss: the loss on the tune split; None if the run diverged.
        diverged: the error that ended a diverged run.
    """
    rows = read_metrics(out / "metrics.jsonl")
    result: dict[str, Any] = {
        "finished": True,
        "steps": steps,
        "tokens": (diverged.step if diverged else steps) * tokens_per_step,
        "terminal_val_loss": None if diverged else val_loss,
        "terminal_tune_loss": tune_loss,
        "seconds": round(seconds, 3),
    }
    if skipped := sum(row.get("skipped", 0) for row in rows):
        result["skipped_steps"] = skipped
    if changes := changes_of(out):
        result[CHANGES] = changes
    if diverged:
        result |= {"diverged": True, "diverged_at_step": diverged.step}
        result["not_finite"] = {"what": diverged.what, "where": diverged.where}
    if main:
        write_json_atomic(out / RESULT, result)
    return result
