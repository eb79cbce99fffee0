"""Compute the content of compare.json from finished runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwise_lr.analysis.starting_scales import peak_lr_over_rms
from blockwise_lr.compare import wording
from blockwise_lr.compare.arms import Series
from blockwise_lr.compare.caveats import series_at_edge, warnings_about
from blockwise_lr.compare.over_seeds import SpeedUpOverSeeds, loss_gap, speedup_over_seeds
from blockwise_lr.compare.plan import Run
from blockwise_lr.compare.results import Results, RunResult
from blockwise_lr.compare.speedup import UNDEFINED, SpeedUp, decayed_speedup, paper_speedup
from blockwise_lr.train.initial_rms import initial_scales_of
from blockwise_lr.train.ratio_text import parse_ratios


def build_content(results: Results, out: Path, *, command: str, date: str) -> dict[str, Any]:
    """Return the content of compare.json.

    A value is null if it depends on a run that diverged. The main keys are:

    - "preset", "steps", "seeds", "arms": what was compared, with the terminal losses of every run.
    - "initial_rms": the RMS of each block's weights before training. In "arms", "lr_over_initial_rms" has the peak
      learning rate of each block over it.
    - "comparisons": for each arm, "loss_gap", "speedup" and "speedup_decayed" over all seeds and for each of them,
      and a "statement" in words.
    - "answer": the statements, best arm first. "warnings": limits of the results, in words.
    - "baseline_against_itself": the speed-up by the paper's measure of the baseline's own N-step run.
    - "tuning": every run of the grid. "at_edge": the series whose base learning rate is at the edge of the grid.
    - "other_runs": finished runs of an earlier plan in the same folder.
    - "command", "date", "seconds", "config", "hardware", "versions", "git_commit", "data": how it was run.

    Args:
        results: the finished runs.
        out: the comparison's folder; paths of runs are relative to it.
        command: the command line that repeats the comparison.
        date: the date of the comparison, ISO 8601.
    """
    plan = results.plan
    baseline, arms = plan.series[0], [s for s in plan.series[1:] if s.horizon == "N"]
    content: dict[str, Any] = {
        "preset": plan.base.preset,
        "steps": plan.base.steps,
        "seeds": list(plan.seeds),
        "initial_rms": {block.value: rms for block, rms in initial_scales_of(plan.base.model).items()},
        "arms": {series.name: _arm(results, series, out) for series in plan.series},
        "comparisons": [_comparison(results, series, baseline) for series in arms],
        "baseline_against_itself": _speedup_dict(*_speedups(results, baseline, "paper")),
        "tuning": [_tuning(results, run, result, out) for run, result in results.tuning],
        "other_runs": [_other_run(result, out) for result in results.others],
        "tuned": plan.tuned is not None if plan.base_lrs is None else plan.tunes,
        "base_lrs": None if plan.base_lrs is None else list(plan.base_lrs),
        "warmups": None if plan.warmups is None else list(plan.warmups),
        "refined": plan.refine,
        "at_edge": series_at_edge(results),
        "command": command,
        "date": date,
        "seconds": sum(run.result.get("seconds") or 0.0 for run in results.all_runs),
        "config": plan.base.to_dict(),
    }
    for key in ("hardware", "versions", "git_commit", "data"):
        content[key] = results.all_runs[0].config.get(key)
    content["warnings"] = warnings_about(results, content)
    for comparison in content["comparisons"]:
        comparison["statement"] = wording.statement(comparison, content)
    content["answer"] = wording.answer(content)
    return content


def _arm(results: Results, series: Series, out: Path) -> dict[str, Any]:
    seeds = [
        {
            "seed": seed,
            "terminal_val_loss": _finite(run.val_loss),
            "terminal_tune_loss": _finite(run.tune_loss),
            "diverged_at_step": run.result.get("diverged_at_step"),
            "seconds": run.result.get("seconds"),
            "run": run.folder.relative_to(out).as_posix(),
        }
        for seed, run in zip(results.plan.seeds, results.runs_of(series))
    ]
    losses = [run.val_loss for run in results.runs_of(series)]
    return {
        "optimizer": series.arm.optimizer,
        "ratios": series.arm.ratios,
        "base_lr": results.chosen[series.name].base_lr,
        "lr_over_initial_rms": _lr_over_rms(results, series),
        "warmup_fraction": results.chosen[series.name].warmup_fraction,
        "steps": series.steps,
        "horizon": series.horizon,
        "role": "baseline" if series.arm == results.plan.arms[0] else "arm",
        "mean_terminal_val_loss": _finite(sum(losses) / len(losses)),
        "seeds": seeds,
    }


def _lr_over_rms(results: Results, series: Series) -> dict[str, float]:
    """Return the peak learning rate of each block over the RMS of its weights before training."""
    base = results.plan.base
    return peak_lr_over_rms(
        base.model,
        results.chosen[series.name].base_lr,
        parse_ratios(series.arm.ratios),
        relative_to_init=base.optim.relative_to == "init",
    )


def _comparison(results: Results, series: Series, baseline: Series) -> dict[str, Any]:
    baseline_losses = [run.val_loss for run in results.runs_of(baseline)]
    arm_losses = [run.val_loss for run in results.runs_of(series)]
    gap = loss_gap(baseline_losses, arm_losses)
    return {
        "arm": series.name,
        "against": baseline.name,
        "loss_gap": {
            "mean": gap.mean,
            "ci95": gap.ci95,
            "p_value": gap.p_value,
            "significant": gap.significant,
            "per_seed": [_finite(b - a) for b, a in zip(baseline_losses, arm_losses)],
            **_reason(gap.reason),
        },
        "speedup": _speedup_dict(*_speedups(results, series, "paper")),
        "speedup_decayed": _speedup_dict(*_speedups(results, series, "decayed")),
        "diverged": {
            name: diverged
            for name in [s.name for s in results.plan.series if s.arm == baseline.arm or s == series]
            if (diverged := [seed for seed, run in results.final[name].items() if run.diverged])
        },
    }


def _speedups(results: Results, series: Series, kind: str) -> tuple[SpeedUpOverSeeds, list[SpeedUp]]:
    """Return the speed-up of a series over the baseline's runs of the same seeds: aggregated, and for each seed."""
    plan = results.plan
    horizons = [s for s in plan.series if s.arm == plan.arms[0]]
    double = next(s for s in horizons if s.horizon == "2N")
    per_seed = []
    for seed in plan.seeds:
        target = results.final[series.name][seed].val_loss
        baseline = {s.steps: results.final[s.name][seed] for s in horizons}
        if kind == "paper":
            run = baseline[double.steps]
            per_seed.append(
                UNDEFINED if run.diverged else paper_speedup(*run.curve(), target, n_steps=plan.base.steps)
            )
        elif any(run.diverged for run in baseline.values()):
            per_seed.append(UNDEFINED)
        else:
            losses = {steps: run.val_loss for steps, run in baseline.items()}
            per_seed.append(decayed_speedup(losses, target, n_steps=plan.base.steps))
    return speedup_over_seeds(per_seed), per_seed


def _speedup_dict(mean: SpeedUpOverSeeds, per_seed: list[SpeedUp]) -> dict[str, Any]:
    return {
        "value": mean.value,
        "bound": mean.bound,
        "ci95": mean.ci95,
        "per_seed": [{"value": s.value, "bound": s.bound, **_reason(s.reason)} for s in per_seed],
        **_reason(mean.reason),
    }


def _reason(reason: str | None) -> dict[str, str]:
    """Return an entry with the reason for a missing value or interval; empty if none is missing."""
    return {} if reason is None else {"reason": reason}


def _tuning(results: Results, run: Run, result: RunResult, out: Path) -> dict[str, Any]:
    return {
        "arm": run.series.name,
        "base_lr": run.base_lr,
        "warmup_fraction": run.setting.warmup_fraction,
        "seed": run.config.seed,
        "steps": run.config.steps,
        "tune_loss": _finite(result.tune_loss),
        "val_loss": _finite(result.val_loss),
        "diverged_at_step": result.result.get("diverged_at_step"),
        "seconds": result.result.get("seconds"),
        "chosen": run.setting == results.chosen[run.series.name],
        "run": result.folder.relative_to(out).as_posix(),
    }


def _other_run(result: RunResult, out: Path) -> dict[str, Any]:
    train: Mapping[str, Any] = result.config.get("train") or {}
    optim: Mapping[str, Any] = train.get("optim") or {}
    return {
        "run": result.folder.relative_to(out).as_posix(),
        "optimizer": optim.get("optimizer"),
        "ratios": optim.get("ratios"),
        "base_lr": optim.get("base_lr"),
        "warmup_fraction": optim.get("warmup_fraction"),
        "seed": train.get("seed"),
        "steps": train.get("steps"),
        "tune_loss": _finite(result.tune_loss),
        "val_loss": _finite(result.val_loss),
        "seconds": result.result.get("seconds"),
    }


def _finite(value: float) -> float | None:
    """Return None for the infinite loss of a diverged run, which JSON cannot hold."""
    return value if math.isfinite(value) else None
