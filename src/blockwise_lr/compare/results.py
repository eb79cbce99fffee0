"""Read finished runs from disk, and find those that a plan needs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwise_lr.compare.arms import Series
from blockwise_lr.compare.plan import Plan, Run
from blockwise_lr.errors import UserError
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.presets import Setting


@dataclass(frozen=True)
class RunResult:
    """One finished run, read from its folder.

    Args:
        folder: the run's folder.
        result: content of result.json.
        config: content of config.json, with "train", "versions", "git_commit", "hardware" and "data".
        metrics: the entries of metrics.jsonl, in the order of steps.
    """

    folder: Path
    result: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def diverged(self) -> bool:
        """Whether the run stopped because its loss was no longer finite."""
        return bool(self.result.get("diverged"))

    @property
    def val_loss(self) -> float:
        """Terminal validation loss in nats per token; +inf if the run diverged."""
        return _loss(self.result, "terminal_val_loss")

    @property
    def tune_loss(self) -> float:
        """Terminal loss on the tune split in nats per token; +inf if the run diverged."""
        return _loss(self.result, "terminal_tune_loss")

    def curve(self) -> tuple[list[int], list[float]]:
        """Return the evaluated steps and their finite validation losses, including the terminal loss."""
        points = {line["step"]: line["val_loss"] for line in self.metrics if _is_finite(line.get("val_loss"))}
        points.pop(0, None)  # speed-ups need steps above 0
        if not self.diverged:
            points[self.result["steps"]] = self.val_loss
        steps = sorted(points)
        return steps, [points[step] for step in steps]


@dataclass(frozen=True)
class Results:
    """All finished runs of a plan.

    Args:
        plan: the plan.
        tuning: every run of the grid in the plan's order, followed by the runs that refine it; empty without a grid.
        chosen: {series name: the setting chosen for it}.
        final: {series name: {seed: run}} at the chosen settings.
        others: other finished runs in the folder, from an earlier plan. They are kept and reported.
    """

    plan: Plan
    tuning: list[tuple[Run, RunResult]]
    chosen: dict[str, Setting]
    final: dict[str, dict[int, RunResult]]
    others: list[RunResult]

    @property
    def all_runs(self) -> list[RunResult]:
        """All runs of the plan, without duplicates."""
        runs = {r.folder: r for _, r in self.tuning}
        runs.update({r.folder: r for by_seed in self.final.values() for r in by_seed.values()})
        return list(runs.values())

    def runs_of(self, series: Series) -> list[RunResult]:
        """Return the runs of one series at its chosen settings, in the plan's order of seeds."""
        return [self.final[series.name][seed] for seed in self.plan.seeds]


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a finished run. A run that diverged is finished.

    Raises:
        UserError: result.json is not the result of a run.
    """
    try:
        return bool(json.loads((folder / "result.json").read_text(encoding="utf-8"))["finished"])
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / 'result.json'} is not a run's result; delete the folder to run it again"
        ) from None


def check_unchanged(run: Run, folder: Path) -> None:
    """Check that no train command changed the number of steps of a run in between.

    Args:
        run: the run that the plan needs.
        folder: its folder, which need not exist yet.

    Raises:
        UserError: the number of steps was changed, or config.json cannot be read.
    """
    if not (folder / "config.json").exists():
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        steps, changes = config["train"].get("steps", run.config.steps), config.get("changes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read {folder / 'config.json'}: {error}; delete the folder to run it again"
        ) from None
    if changes or steps != run.config.steps:
        raise UserError(
            f"the run in {folder} was trained to {steps} steps by another command, and the comparison needs "
            f"{run.config.steps} steps of one schedule: move the folder elsewhere, and run the same command again"
        )


def read_run(folder: Path) -> RunResult:
    """Read a finished run from its folder.

    Raises:
        UserError: a file is missing or has unexpected content.
    """
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        metrics = sorted(read_metrics(folder / "metrics.jsonl"), key=lambda row: row["step"])
        run = RunResult(folder, result, config, metrics)
        if not run.diverged and not (_is_finite(run.val_loss) and _is_finite(run.tune_loss)):
            raise ValueError("result.json holds a loss that is not finite")
        run.curve()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read the run in {folder}: {type(error).__name__}: {error}; "
            f"delete the folder to run it again"
        ) from None
    return run


def read_results(plan: Plan, out: Path) -> Results:
    """Read every run that `plan` needs from `out`/runs.

    Raises:
        UserError: runs are missing (the message says how many), or a run cannot be read.
    """
    tuning_runs = plan.tuning_runs()
    tuning = list(zip(tuning_runs, _read_all(tuning_runs, out)))
    refining_runs = plan.refining_runs({run: result.tune_loss for run, result in tuning})
    tuning += zip(refining_runs, _read_all(refining_runs, out))
    chosen = plan.choose({run: result.tune_loss for run, result in tuning})
    final_runs = plan.final_runs(chosen)
    final: dict[str, dict[int, RunResult]] = {}
    for run, result in zip(final_runs, _read_all(final_runs, out)):
        final.setdefault(run.series.name, {})[run.config.seed] = result
    needed = {run.folder for run in [*tuning_runs, *refining_runs, *final_runs]}
    folders = sorted(path.parent for path in (out / "runs").glob("*/result.json"))
    others = [read_run(folder) for folder in folders if folder.name not in needed and is_finished(folder)]
    return Results(plan, tuning, chosen, final, others)


def _read_all(runs: Sequence[Run], out: Path) -> list[RunResult]:
    folders = [out / "runs" / run.folder for run in runs]
    missing = [folder for folder in folders if not is_finished(folder)]
    if missing:
        raise UserError(
            f"the comparison in {out} is not finished: {len(missing)} of {len(runs)} runs are missing, "
            f"{missing[0].name} among them; run the same compare command again to resume"
        )
    for run, folder in zip(runs, folders):
        check_unchanged(run, folder)
    return [read_run(folder) for folder in folders]


def _loss(result: dict[str, Any], key: str) -> float:
    return math.inf if result.get("diverged") else float(result[key])


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
