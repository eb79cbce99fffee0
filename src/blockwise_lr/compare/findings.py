"""From finished runs to the content of compare.json: arms, comparisons, and what must be said about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwise_lr.compare import wording
from blockwise_lr.compare.arms import Series
from blockwise_lr.compare.plan import Run
from blockwise_lr.compare.results import Results, RunResult
from blockwise_lr.compare.speedup import (
    UNDEFINED,
    SpeedUp,
    SpeedUpOverSeeds,
    decayed_speedup,
    loss_gap,
    paper_speedup,
    speedup_over_seeds,
)


def build_content(results: Results, out: Path, *, command: str, date: str) -> dict[str, Any]:
    """What compare.json holds: the schema of DESIGN section 4, and beside it everything else worth reporting.

    A number that a diverged run would have to supply is null. Keys beyond the schema: per-seed values and a
    sentence in each comparison, "tuning" (every run of the grid), "other_runs", "baseline_against_itself"
    (the paper's speed-up of the baseline's own N-step run), "at_edge" (the series whose base learning rate is at the
    edge of the grid), "warnings", and where, when and how it was run.

    Args:
        results: the finished runs.
        out: the comparison's folder; runs are named relative to it.
        command: the command line that repeats the comparison.
        date: when it was run, ISO 8601.
    """
    plan = results.plan
    baseline, arms = plan.series[0], [s for s in plan.series[1:] if s.horizon == "N"]
    content: dict[str, Any] = {
        "preset": plan.base.preset,
        "steps": plan.base.steps,
        "seeds": list(plan.seeds),
        "arms": {series.name: _arm(results, series, out) for series in plan.series},
        "comparisons": [_comparison(results, series, baseline) for series in arms],
        "baseline_against_itself": _speedup_dict(*_speedups(results, baseline, "paper")),
        "tuning": [_tuning(results, run, result, out) for run, result in results.tuning],
        "other_runs": [_other_run(result, out) for result in results.others],
        "tuned": plan.tuned is not None if plan.base_lrs is None else plan.tunes,
        "base_lrs": None if plan.base_lrs is None else list(plan.base_lrs),
        "warmups": None if plan.warmups is None else list(plan.warmups),
        "refined": plan.refine,
        "at_edge": _at_edge(results),
        "command": command,
        "date": date,
        "seconds": sum(run.result.get("seconds") or 0.0 for run in results.all_runs),
        "config": plan.base.to_dict(),
    }
    for key in ("hardware", "versions", "git_commit", "data"):
        content[key] = results.all_runs[0].config.get(key)
    content["warnings"] = _warnings(results, content)
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
        for seed, run in zip(results.plan.seeds, results.of(series))
    ]
    losses = [run.val_loss for run in results.of(series)]
    return {
        "optimizer": series.arm.optimizer,
        "ratios": series.arm.ratios,
        "base_lr": results.chosen[series.name].base_lr,
        "warmup_fraction": results.chosen[series.name].warmup_fraction,
        "steps": series.steps,
        "horizon": series.horizon,
        "role": "baseline" if series.arm == results.plan.arms[0] else "arm",
        "mean_terminal_val_loss": _finite(sum(losses) / len(losses)),
        "seeds": seeds,
    }


def _comparison(results: Results, series: Series, baseline: Series) -> dict[str, Any]:
    baseline_losses = [run.val_loss for run in results.of(baseline)]
    arm_losses = [run.val_loss for run in results.of(series)]
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
    """Speed-up of a series against the baseline's runs of the same seed, over seeds and for each of them."""
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
    """Why there is no value or no interval; nothing where there is one."""
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


def _warnings(results: Results, content: dict[str, Any]) -> list[str]:
    plan, found = results.plan, []
    if len(plan.seeds) == 1:
        found.append(wording.ONE_SEED + ".")
    if plan.base_lrs is None and plan.tuned is None:
        found.append(
            f"No base learning rate was tuned: every arm ran at {plan.base.optim.base_lr:g}, "
            f"which may suit one arm better than another."
        )
    if plan.base_lrs is not None and not plan.tunes:
        found.append(
            f"The grid holds one base learning rate, {plan.base_lrs[0]:g}, so no arm was tuned; it may suit "
            f"one arm better than another."
        )
    elif plan.tunes:
        found += _grid_warnings(results)
    for series in plan.series:
        diverged = [str(seed) for seed, run in results.final[series.name].items() if run.diverged]
        if diverged:
            found.append(
                f"{series.name} diverged with seed {', '.join(diverged)}; "
                f"numbers that need these runs are left out."
            )
    for key in ("hardware", "versions", "git_commit", "data"):
        if any(run.config.get(key) != content[key] for run in results.all_runs):
            found.append(f"The runs differ in {key.replace('_', ' ')}; each run's config.json has its own.")
    comparisons = len(content["comparisons"])
    if comparisons > 1 and len(plan.seeds) > 1:
        found.append(
            f"{comparisons} comparisons, each tested at the 5 % level; not corrected for their number."
        )
    return found


def _grid_warnings(results: Results) -> list[str]:
    found: list[str] = []
    lr_edges = [f"{name} ({results.chosen[name].base_lr:g})" for name in _at_edge(results)]
    warmup_edges = []
    warmups = results.plan.warmups or ()
    for series in results.plan.series:
        chosen = results.chosen[series.name]
        runs = [(run.setting, result) for run, result in results.tuning if run.series == series]
        if all(result.diverged for _, result in runs):
            found.append(f"{series.name} diverged at every base learning rate of the grid.")
            continue
        # Two warm-ups are both edges: nothing to report.
        if len(warmups) > 2 and chosen.warmup_fraction in (min(warmups), max(warmups)):
            warmup_edges.append(f"{series.name} ({chosen.warmup_fraction:.0%})")
    for what, flag, at_edge in (
        ("base learning rate", "--base-lrs", lr_edges),
        ("warm-up", "--warmups", warmup_edges),
    ):
        if at_edge:
            found.append(
                f"The chosen {what} is at the edge of the grid for {', '.join(at_edge)}: the optimum "
                f"may lie outside; widen {flag}."
            )
    return found


def _at_edge(results: Results) -> list[str]:
    """The series whose chosen base learning rate is the lowest or the highest tried with its warm-up.

    They count as not tuned: their optimum may lie outside. A series that always diverged is none of them.
    """
    found = []
    for series in results.plan.series if results.plan.tunes else ():
        chosen = results.chosen[series.name]
        runs = [(run.setting, result) for run, result in results.tuning if run.series == series]
        lrs = {setting.base_lr for setting, _ in runs if setting.warmup_fraction == chosen.warmup_fraction}
        converged = any(not result.diverged for _, result in runs)
        if converged and len(lrs) > 1 and chosen.base_lr in (min(lrs), max(lrs)):
            found.append(series.name)
    return found


def _finite(value: float) -> float | None:
    """JSON has no infinity: null stands for a diverged run."""
    return value if math.isfinite(value) else None
