"""Warnings about a comparison: untuned arms, the edges of the grid, diverged runs, unequal machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwise_lr.compare.results import Results


def warnings_about(results: Results, content: Mapping[str, Any]) -> list[str]:
    """Return what limits the conclusions from a comparison, one sentence each.

    Args:
        results: the finished runs.
        content: the content of compare.json so far.
    """
    plan, found = results.plan, []
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
                f"values that depend on these runs are missing."
            )
    for key in ("hardware", "versions", "git_commit", "data"):
        if any(run.config.get(key) != content[key] for run in results.all_runs):
            found.append(f"The runs differ in {key.replace('_', ' ')}; each run's config.json has its own.")
    comparisons = len(content["comparisons"])
    if comparisons > 1 and len(plan.seeds) > 1:
        found.append(
            f"{comparisons} comparisons, each tested at the 5 % level, without a correction for multiple testing."
        )
    return found


def _grid_warnings(results: Results) -> list[str]:
    found: list[str] = []
    lr_edges = [f"{name} ({results.chosen[name].base_lr:g})" for name in series_at_edge(results)]
    warmup_edges = []
    warmups = results.plan.warmups or ()
    for series in results.plan.series:
        chosen = results.chosen[series.name]
        runs = [(run.setting, result) for run, result in results.tuning if run.series == series]
        if not runs:  # an arm of a sweep that has the setting of another arm
            continue
        if all(result.diverged for _, result in runs):
            found.append(f"{series.name} diverged at every base learning rate of the grid.")
            continue
        # With two warm-ups, each is at an edge, so that says nothing.
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


def series_at_edge(results: Results) -> list[str]:
    """Return the series whose chosen base learning rate is the lowest, highest or only one tried with its warm-up.

    They count as not tuned, because their optimum may be outside the grid. A series that always diverged is not
    included.
    """
    found = []
    for series in results.plan.series if results.plan.tunes else ():
        chosen = results.chosen[series.name]
        runs = [(run.setting, result) for run, result in results.tuning if run.series == series]
        lrs = {setting.base_lr for setting, _ in runs if setting.warmup_fraction == chosen.warmup_fraction}
        converged = any(not result.diverged for _, result in runs)
        if converged and chosen.base_lr in (min(lrs), max(lrs)):
            found.append(series.name)
    return found
