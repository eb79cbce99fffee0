"""Compute the content of robustness.json and ablation.json from finished runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockwise_lr.compare.caveats import series_at_edge, warnings_about
from blockwise_lr.compare.over_seeds import loss_gap
from blockwise_lr.compare.ratio_sweeps import TOLERANCE, Kind, Point, blocks_of, valley_width
from blockwise_lr.compare.results import Results, RunResult
from blockwise_lr.compare.sweep_plan import SweepPlan, series_of
from blockwise_lr.compare.sweep_wording import answer
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.presets import Setting
from blockwise_lr.train.ratio_text import parse_ratios


def sweep_content(
    kind: Kind, points: Sequence[Point], results: Results, out: Path, *, command: str, date: str
) -> dict[str, Any]:
    """Return the content of KIND.json.

    Returns:
        A dictionary. A value is None if it depends on a run that diverged. The main keys are:

        - "points": for each arm "arm", "ratios", "curve", "position", "setting", "losses" by seed, "loss" (their mean),
          and "cost": the mean rise of the loss against the first point, with "ci95", paired by seed.
        - "baseline": the arm with uniform ratios, in the same form, and "gain": the loss that the sweep's ratios win
          over it. "centre": the arm with the sweep's ratios.
        - "widths" (robustness): how far each ratio can move for 0.01 nats; "per_seed" has it by seed.
        - "worth" (ablation): by order and block, the loss that switching the block on wins, with "ci95".
        - "tuning": every run of the grid. "at_edge": the arms whose base learning rate is at its edge. "tuned_arms":
          the arms whose setting was tuned, here or with the preset. "tuned": whether all arms were tuned here.
        - "answer" and "warnings": the results and their limits, in words.
        - "runs": every run. "kind", "preset", "steps", "seeds", "command", "date", "seconds", "config", "hardware",
          "versions", "git_commit", "data": how it was run.
    """
    plan = _plan(results)
    losses = {series.name: [run.val_loss for run in results.runs_of(series)] for series in plan.series}
    reference = losses[points[0].arm.name]
    found = [_point(point, results, reference) for point in points]
    first = next(iter(results.all_runs)).config
    content: dict[str, Any] = {
        "kind": kind, "preset": plan.base.preset, "steps": plan.base.steps, "seeds": list(plan.seeds),
        "optimizer": plan.base.optim.optimizer, "ratios": plan.base.optim.ratios, "centre": plan.centre,
        "baseline": _baseline(results, losses), "points": found,
        "widths": _widths(points, losses) if kind == "robustness" else {},
        "worth": _worth(found, losses, plan.base.model) if kind == "ablation" else {},
        "tuned": plan.tunes and not plan.follows, "tuned_arms": _tuned_arms(results),
        "base_lrs": plan.base_lrs, "warmups": plan.warmups, "refined": plan.refine,
        "at_edge": series_at_edge(results),
        "tuning": [
            {**_run(run.config.seed, run.setting, result, out), "arm": run.series.name,
             "chosen": run.setting == results.chosen[run.series.name]}
            for run, result in results.tuning
        ],
        "runs": [
            {**_run(seed, results.chosen[name], result, out), "arm": name}
            for name, by_seed in results.final.items() for seed, result in by_seed.items()
        ],
        "seconds": sum(run.result.get("seconds") or 0.0 for run in results.all_runs),
        "command": command, "date": date, "config": plan.base.to_dict(),
        **{key: first.get(key) for key in ("hardware", "versions", "git_commit", "data")},
    }  # fmt: skip
    content["warnings"] = _warnings(results, content)
    content["answer"] = answer(content)
    return content


def _plan(results: Results) -> SweepPlan:
    plan = results.plan
    assert isinstance(plan, SweepPlan)
    return plan


def _point(point: Point, results: Results, reference: Sequence[float]) -> dict[str, Any]:
    series = series_of(results.plan, point.arm.name)
    losses = [run.val_loss for run in results.runs_of(series)]
    gap = loss_gap(reference, losses)
    return {
        "arm": point.arm.name, "ratios": series.arm.ratios, "curve": point.curve, "position": point.position,
        "setting": str(results.chosen[series.name]),
        "losses": {str(seed): _finite(loss) for seed, loss in zip(results.plan.seeds, losses)},
        "loss": _finite(float(np.mean(losses))),
        "cost": {
            "mean": None if gap.mean is None else -gap.mean + 0.0,
            "ci95": None if gap.ci95 is None else [-gap.ci95[1] + 0.0, -gap.ci95[0] + 0.0],
        },
    }  # fmt: skip


def _baseline(results: Results, losses: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    plan = _plan(results)
    uniform = losses[plan.baseline]
    gap = loss_gap(uniform, losses[plan.centre])
    return {
        "arm": plan.baseline,
        "setting": str(results.chosen[plan.baseline]),
        "losses": {str(seed): _finite(loss) for seed, loss in zip(plan.seeds, uniform)},
        "loss": _finite(float(np.mean(uniform))),
        "gain": {
            "mean": gap.mean,
            "ci95": gap.ci95,
            "p_value": gap.p_value,
            "significant": gap.significant,
        },
    }


def _widths(points: Sequence[Point], losses: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    middle = losses[points[0].arm.name]
    found = {}
    for curve in dict.fromkeys(point.curve for point in points if point.curve):
        own = [point for point in points if point.curve == curve]
        costs = {point.position: loss_gap(losses[point.arm.name], middle).mean for point in own}
        found[curve] = valley_width(costs, TOLERANCE)
        found[curve]["per_seed"] = [
            valley_width(
                {p.position: _finite(losses[p.arm.name][seed] - middle[seed]) for p in own}, TOLERANCE
            )
            for seed in range(len(middle))
            if math.isfinite(middle[seed])
        ]
    return found


def _worth(
    points: Sequence[Mapping[str, Any]], losses: Mapping[str, Sequence[float]], model: ModelConfig
) -> dict[str, Any]:
    """Return by order and block what switching the block on wins, given the blocks that are on before it."""
    first, last = points[0], points[-1]
    curves = dict.fromkeys(point["curve"] for point in points if point["curve"])
    if not curves:  # one block alone
        ratios = resolve_ratios(parse_ratios(last["ratios"]))  # may name blocks that the model lacks
        (block,) = [block.value for block in blocks_of(model) if ratios[block] != 1]
        return {"alone": {block: _gain(losses, first["arm"], last["arm"])}}
    added = {curve: [p["arm"].rpartition("+")[2] for p in points if p["curve"] == curve] for curve in curves}
    found: dict[str, Any] = {}
    for curve in curves:
        (other,) = [each for each in curves if each != curve]
        path = [first, *(p for p in points if p["curve"] == curve), last]
        blocks = [*added[curve], added[other][0]]  # the first block of one order is the last one of the other
        found[curve] = {
            block: _gain(losses, before["arm"], after["arm"])
            for block, before, after in zip(blocks, path, path[1:])
        }
    return found


def _gain(losses: Mapping[str, Sequence[float]], before: str, after: str) -> dict[str, Any]:
    gap = loss_gap(losses[before], losses[after])
    return {"mean": gap.mean, "ci95": gap.ci95}


def _tuned_arms(results: Results) -> list[str]:
    plan = _plan(results)
    if plan.base_lrs is None:
        return list(plan.tuned_before)
    edge = series_at_edge(results)
    return [s.name for s in plan.series if plan.tunes and s.name not in (*plan.follows, *edge)]


def _warnings(results: Results, content: Mapping[str, Any]) -> list[str]:
    plan = _plan(results)
    found = []
    if plan.base_lrs is None:
        missing = [name for name in (plan.centre, plan.baseline) if name not in plan.tuned_before]
        if missing and plan.centre != plan.baseline:
            found.append(
                f"The base learning rate was not tuned for {' and '.join(missing)} ({results.chosen[missing[0]]}): it "
                "may suit one arm better than another. Tune it with --base-lrs."
            )
    # A comparison's warnings need its list of comparisons, of which a sweep has none.
    return [*found, *warnings_about(results, {**content, "comparisons": []})]


def _run(seed: int, setting: Setting, result: RunResult, out: Path) -> dict[str, Any]:
    return {
        "seed": seed,
        "base_lr": setting.base_lr,
        "warmup_fraction": setting.warmup_fraction,
        "tune_loss": _finite(result.tune_loss),
        "val_loss": _finite(result.val_loss),
        "seconds": result.result.get("seconds"),
        "run": result.folder.relative_to(out).as_posix(),
    }


def _finite(value: float) -> float | None:
    """Return None for the infinite loss of a diverged run, which JSON cannot hold."""
    return value if math.isfinite(value) else None
