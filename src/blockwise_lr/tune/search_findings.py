"""Compute the content of tune.json from the trials of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockwise_lr.analysis.starting_scales import peak_lr_over_rms
from blockwise_lr.blocks import Block
from blockwise_lr.compare.over_seeds import loss_gap
from blockwise_lr.errors import UserError
from blockwise_lr.train.build_model import count_parameters
from blockwise_lr.train.initial_rms import initial_scales_of
from blockwise_lr.tune import search_wording
from blockwise_lr.tune.proxy import describe_size
from blockwise_lr.tune.search_plan import SearchPlan
from blockwise_lr.tune.space import Point, Space
from blockwise_lr.tune.trial_store import TrialRecord, TrialStore
from blockwise_lr.tune.valley import REACH, Valley, fit_valleys, near_trials, needed_trials, paired_noise

_UNKNOWN_NOISE = 0.01  # nats; used for the fit where no point was trained with two seeds
_CERTAIN = 2.0  # standard errors
_STEP = 0.15  # on a log2 scale; a value that is nearer counts as the same


def build_content(
    plan: SearchPlan, store: TrialStore, out: Path, *, command: str, about: Mapping[str, Any], date: str
) -> dict[str, Any]:
    """Return the content of tune.json. A loss of a run that diverged or was ended is null.

    The main keys are:

    - "preset", "steps", "sampler", "seeds", "proxy", "blocks": what was searched, and on which model.
    - "trials": every trial, with its training losses.
    - "uniform", "best": the best trial with one learning rate for all blocks, and the best of all.
    - "ratios": the ratios of the best trial, the content of ratios.json.
    - "gain": the validation loss of "uniform" minus that of "best" over the seeds, with its interval. "fresh_mean" is
      the mean over the seeds that chose nothing.
    - "initial_rms": the RMS of each block's weights before training. In "best", "lr_over_initial_rms" has the peak
      learning rate of each block over it.
    - "valleys": for each block, how far its ratio can move, what a ratio of 1 costs, and whether that is decided.
    - "answer", "warnings", "paste": the findings in words, their limits, and the lines to paste.

    Args:
        plan: the plan of the search.
        store: its trials.
        out: its folder, for the lines to paste.
        command: the command line that repeats the search.
        about: "hardware", "versions", "git_commit" and "data" of the runs.
        date: the date of the search, ISO 8601.

    Raises:
        UserError: trials are missing.
    """
    records = [record for _, record in sorted(store.records.items())]
    uniform, best = store.best("uniform"), store.best("uniform", "ratios")
    if uniform is None or best is None:
        raise UserError(
            "the search has no finished trial yet; run the same tune command again to continue it"
        )
    blocks = plan.blocks()
    space = plan.space(blocks)
    seeds = [plan.seed + i for i in range(plan.repeats)]
    runs = {name: _runs_of(trial, records, seeds) for name, trial in (("uniform", uniform), ("best", best))}
    noise = paired_noise(*([run.loss for run in runs[name]] for name in ("uniform", "best")))
    search = [record for record in records if record.phase != "repeat" and record.order is not None]
    ratios = dict.fromkeys(blocks, 1.0) | dict(best.point.ratios)
    model = plan.model
    scales = {block.value: scale for block, scale in initial_scales_of(model).items()}
    content: dict[str, Any] = {
        "preset": plan.base.preset,
        "steps": plan.base.steps,
        "sampler": plan.sampler_name,
        "seed": plan.seed,
        "seeds": seeds,
        "blocks": blocks,
        "reference": space.reference,
        "proxy": {
            "size": describe_size(model),
            "parameters": count_parameters(model),
            "stands_for": None if model == plan.base.model else describe_size(plan.base.model),
        },
        "early_end": plan.to_dict()["early_end"],
        "uniform_trials": sum(record.phase == "uniform" for record in search),
        "uniform": {
            **_chosen(uniform, runs["uniform"]),
            "bracketed": is_bracketed("base_lr", uniform, search, space),
            "warmup_bracketed": is_bracketed("warmup", uniform, search, space),
        },
        "initial_rms": scales,
        "best": {
            **_chosen(best, runs["best"]),
            "lr_over_initial_rms": peak_lr_over_rms(
                model,
                best.point.base_lr,
                {Block(block): ratio for block, ratio in ratios.items()},
                relative_to_init=plan.base.optim.relative_to == "init",
            ),
        },
        "start": _start(plan, space, uniform.point, search),
        "ratios": ratios,
        "lr_factor": best.point.base_lr / uniform.point.base_lr,
        "gain": _gain(runs["uniform"], runs["best"]),
        "noise": noise,
        "valleys": _valleys(space, search, best, uniform, noise or _UNKNOWN_NOISE),
        "near_trials": len(
            near_trials(space, [r.point for r in search], [r.loss for r in search], best.point)
        ),
        "needed_trials": needed_trials(space),
        "counts": {s: sum(r.status == s for r in search) for s in ("finished", "ended", "diverged")},
        "trials": [record.to_dict() for record in records],
        "seconds": sum(record.seconds or 0.0 for record in records),
        "command": command,
        "date": date,
        "out": out.as_posix(),
        "config": plan.base.to_dict(),
        **about,
    }
    content["paste"] = search_wording.paste(plan, content)
    content["warnings"] = search_wording.warnings(content)
    content["answer"] = search_wording.answer(content)
    return content


def _runs_of(trial: TrialRecord, records: Sequence[TrialRecord], seeds: Sequence[int]) -> list[TrialRecord]:
    """Return the runs of a trial's point, one for each seed."""
    ended = [r for r in records if r.order is not None and r.point == trial.point]
    by_seed = {record.seed: record for record in ended if record.phase == "repeat"} | {trial.seed: trial}
    if missing := [seed for seed in seeds if seed not in by_seed]:
        raise UserError(
            f"the runs of trial {trial.number} with the seeds {', '.join(map(str, missing))} are missing; run the same "
            "tune command again to continue the search"
        )
    return [by_seed[seed] for seed in seeds]


def _chosen(trial: TrialRecord, runs: Sequence[TrialRecord]) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "point": trial.point.to_dict(),
        "tune_loss": trial.tune_loss,
        "runs": [
            {"seed": r.seed, "trial": r.number, "val_loss": r.val_loss, "tune_loss": r.tune_loss}
            for r in runs
        ],
    }


def is_bracketed(name: str, uniform: TrialRecord, search: Sequence[TrialRecord], space: Space) -> bool:
    """Return whether a lower and a higher uniform base_lr or warmup were tried than the best one, as far as any is."""
    best = math.log2(getattr(uniform.point, name))
    tried = [math.log2(getattr(record.point, name)) for record in search if record.phase == "uniform"]
    lowest, highest = getattr(space, name)
    is_lower_tried = min(tried) < best - _STEP or best - _STEP < lowest
    is_higher_tried = max(tried) > best + _STEP or best + _STEP > highest
    return is_lower_tried and is_higher_tried


def _start(
    plan: SearchPlan, space: Space, uniform: Point, search: Sequence[TrialRecord]
) -> list[dict[str, Any]]:
    """Return the trials of the known points: the default ratios, and measured."""
    found = []
    for name, point in zip(("half way", "measured"), plan.ratio_start(space, uniform)):
        trial = next((r for r in search if r.point == point and r.phase == "ratios"), None)
        if trial is not None:
            found.append(
                {
                    "name": name,
                    "trial": trial.number,
                    "tune_loss": trial.tune_loss,
                    "val_loss": trial.val_loss,
                }
            )
    return found


def _gain(uniform: Sequence[TrialRecord], best: Sequence[TrialRecord]) -> dict[str, Any]:
    """Return the gain on the val split, paired by seed."""
    pairs = [
        tuple(math.inf if r.val_loss is None else r.val_loss for r in pair) for pair in zip(uniform, best)
    ]
    gap = loss_gap([before for before, _ in pairs], [after for _, after in pairs])
    per_seed = [before - after for before, after in pairs]
    fresh = per_seed[1:]  # the first seed is that of the search, whose trials were chosen by their loss
    fresh_mean = sum(fresh) / len(fresh) if fresh else math.nan
    return {
        "mean": gap.mean,
        "ci95": gap.ci95 and list(gap.ci95),
        "p_value": gap.p_value,
        "significant": gap.significant,
        "fresh_mean": fresh_mean if math.isfinite(fresh_mean) else None,
        "per_seed": [value if math.isfinite(value) else None for value in per_seed],
        "reason": gap.reason,
    }


def _valleys(
    space: Space, search: Sequence[TrialRecord], best: TrialRecord, uniform: TrialRecord, noise: float
) -> dict[str, dict[str, Any]]:
    """Return the entry of every block, of the base learning rate and of the warm-up."""
    fitted = fit_valleys(space, [r.point for r in search], [r.loss for r in search], best.point, noise=noise)
    named = {"base_lr": fitted.pop(space.reference), "warmup": fitted.pop("warmup"), **fitted}
    values = {"base_lr": best.point.base_lr, "warmup": best.point.warmup}
    found = {}
    for name, valley in named.items():
        value = values.get(name, best.point.ratios.get(name, 1.0))
        found[name] = {"value": value, **_moves(valley, value), **valley.to_dict()}
        if name not in values:
            found[name] |= _against_one(valley, value)
    return found


def _moves(valley: Valley, value: float) -> dict[str, Any]:
    moves = valley.moves
    low, high = (None, None) if moves is None else (value * 2.0 ** moves[0], value * 2.0 ** moves[1])
    return {"low": low, "high": high, "bounded": moves is not None}


def _against_one(valley: Valley, ratio: float) -> dict[str, Any]:
    """Return what a ratio of 1 costs, and whether the trials decide that it is worse."""
    if ratio == 1.0:
        return {"cost_of_one": 0.0, "stderr": 0.0, "beyond_reach": False, "decided": False}
    move = -math.log2(ratio)
    cost, stderr = valley.cost(math.copysign(min(abs(move), REACH), move))
    return {
        "cost_of_one": cost,
        "stderr": stderr,
        "beyond_reach": abs(move) > REACH,
        "decided": valley.is_bounded and cost > _CERTAIN * stderr,
    }
