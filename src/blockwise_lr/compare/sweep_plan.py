"""The plan of a sweep over ratios: which arms are tuned, and which take the setting of another arm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from blockwise_lr.compare.arms import Arm, Series
from blockwise_lr.compare.plan import Plan, Run
from blockwise_lr.compare.ratio_sweeps import Point
from blockwise_lr.compare.results import is_finished, read_run
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.presets import Setting
from blockwise_lr.train.ratio_text import canonical_ratios, parse_ratios

Tuned = Literal["references", "all"]


@dataclass(frozen=True)
class SweepPlan(Plan):
    """A plan in which some arms are not tuned, but take the setting of another arm.

    Args:
        centre: name of the arm with the ratios of the sweep.
        baseline: name of the arm with uniform ratios.
        follows: {arm name: name of the arm whose setting it takes}.
        tuned_before: names of the arms whose setting comes tuned with the preset.
    """

    centre: str = ""
    baseline: str = ""
    follows: Mapping[str, str] = field(default_factory=dict)
    tuned_before: tuple[str, ...] = ()

    def tuning_runs(self) -> list[Run]:
        """Return the runs of the grid, for every series that does not follow another."""
        return [run for run in super().tuning_runs() if run.series.name not in self.follows]

    def refining_runs(self, tune_losses: Mapping[Run, float]) -> list[Run]:
        """Return two more tuning runs for every series that does not follow another."""
        runs = super().refining_runs(tune_losses)
        return [run for run in runs if run.series.name not in self.follows]

    def choose(self, tune_losses: Mapping[Run, float]) -> dict[str, Setting]:
        """Choose the setting of every series; a series that follows another has the setting of that one."""
        if self.base_lrs is None:
            return super().choose(tune_losses)
        leaders = [series for series in self.series if series.name not in self.follows]
        chosen = {series.name: self._best(series, tune_losses) for series in leaders}
        return {s.name: chosen[self.follows.get(s.name, s.name)] for s in self.series}

    @property
    def runs_in_all(self) -> int:
        """The number of training runs. A tuned arm's run with the first seed is one of its tuning runs."""
        grid, tuned = len(self.tuning_runs()), len(self.arms) - len(self.follows)
        if not grid:
            return len(self.arms) * len(self.seeds)
        return grid + tuned * (2 * self.refine - 1) + len(self.arms) * len(self.seeds)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepPlan:
        """Return the plan from the data of `to_dict`."""
        plan = Plan.from_dict(values)
        shared = {each.name: getattr(plan, each.name) for each in dataclasses.fields(plan)}
        own = {name: values[name] for name in ("centre", "baseline", "follows")}
        return cls(**shared, **own, tuned_before=tuple(values["tuned_before"]))


def sweep_plan(
    base: TrainConfig,
    points: Sequence[Point],
    *,
    seeds: Sequence[int],
    base_lrs: Sequence[float] | None = None,
    warmups: Sequence[float] | None = None,
    refine: bool = False,
    tuned: Mapping[str, Setting] | None = None,
    tune: Tuned = "references",
) -> SweepPlan:
    """Return the plan that trains the uniform baseline and every point of a sweep for N steps.

    Args:
        base: the configuration that all runs share. Its optimizer and ratios are those of the sweep.
        points: the points. An arm with uniform ratios is added if no point has them.
        seeds, base_lrs, warmups, refine: as in :class:`Plan`.
        tuned: settings that were tuned beforehand, as in :class:`Plan`; used without `base_lrs`. Ratios and uniform
            each have their own; one that is not among them has the base learning rate of `base`, or for uniform the
            setting of the ratios.
        tune: what `base_lrs` tunes. "references": the uniform baseline and the sweep's ratios, each by the rules of a
            comparison; all other arms have the setting of the sweep's ratios. "all": every arm.
    """
    optimizer, ratios = base.optim.optimizer, canonical_ratios(base.optim.ratios)
    arms = [point.arm for point in points]
    centre = next(arm for arm in arms if canonical_ratios(arm.ratios) == ratios)
    baseline = next((arm for arm in arms if _is_uniform(arm)), None)
    if baseline is None:
        baseline = Arm("uniform", optimizer, "uniform")
        arms.append(baseline)
    others = [arm for arm in arms if arm.name not in (centre.name, baseline.name)]
    known = tuned or {}
    setting = known.get(f"{optimizer}:{ratios}:N")
    uniform = known.get(f"{optimizer}:uniform:N") if setting else None
    shared = {_key(arm): setting or Setting(base.optim.base_lr) for arm in arms}
    shared |= {_key(baseline): uniform} if uniform else {}
    before = [
        *([centre.name] if setting else []),
        *([baseline.name] if uniform and baseline is not centre else []),
    ]
    follow = {arm.name: centre.name for arm in others} if base_lrs and tune == "references" else {}
    return SweepPlan(
        base=base,
        arms=tuple(arms),
        seeds=tuple(seeds),
        base_lrs=None if base_lrs is None else tuple(base_lrs),
        tuned=shared if base_lrs is None else None,
        horizons=("N",),
        warmups=None if warmups is None else tuple(warmups),
        refine=refine,
        centre=centre.name,
        baseline=baseline.name,
        follows=follow,
        tuned_before=tuple(before) if base_lrs is None else (),
    )


def finished_runs(plan: SweepPlan, out: Path) -> int:
    """Return how many runs of the plan are finished in `out`.

    Runs whose setting is not chosen yet count as unfinished.
    """
    runs = plan.tuning_runs()
    found = _finished(runs, out)
    losses: dict[Run, float] = {}
    for more in (plan.refining_runs, lambda known: plan.final_runs(plan.choose(known))):
        if any(run.folder not in found for run in runs):
            return len(found)
        losses |= {run: read_run(out / "runs" / run.folder).tune_loss for run in runs}
        runs = more(losses)
        found |= _finished(runs, out)
    return len(found)


def _finished(runs: Sequence[Run], out: Path) -> set[str]:
    return {run.folder for run in runs if is_finished(out / "runs" / run.folder)}


def _key(arm: Arm) -> str:
    return f"{arm.optimizer}:{canonical_ratios(arm.ratios)}:N"


def _is_uniform(arm: Arm) -> bool:
    return set(resolve_ratios(parse_ratios(arm.ratios)).values()) == {1.0}


def series_of(plan: Plan, name: str) -> Series:
    """Return the series of an arm."""
    return next(series for series in plan.series if series.name == name)
