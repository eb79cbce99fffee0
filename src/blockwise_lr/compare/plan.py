"""The plan of a comparison: arms, seeds and learning rates, and the training runs that they need.

This module ensures a fair comparison. Every arm tunes its base learning rate (and, if requested, its warm-up) over the
same grid, with the same seed and number of runs, by the loss on the tune split. The baseline of 2N steps is tuned
at 2N. The name of a run's folder depends on its configuration alone, so a repeated comparison finds its existing runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockwise_lr.compare.arms import HORIZONS, Arm, Series, resolve_arm
from blockwise_lr.errors import UserError
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.config import TrainConfig, config_from_dict, identity
from blockwise_lr.train.presets import Setting
from blockwise_lr.train.ratio_text import parse_moving, parse_ratios


@dataclass(frozen=True)
class Run:
    """One training run of a series. A series is an arm that is trained for one horizon.

    Args:
        series: the series of this run.
        setting: the base learning rate and the warm-up of this run; these are the settings that are tuned.
        config: the full configuration.
        folder: name of the run's folder, readable and unique to the configuration.
    """

    series: Series
    setting: Setting
    config: TrainConfig
    folder: str

    @property
    def base_lr(self) -> float:
        """Peak learning rate of a block with ratio 1."""
        return self.setting.base_lr


@dataclass(frozen=True)
class Plan:
    """The settings of a comparison, and the training runs that follow from them.

    Args:
        base: the configuration that all runs share, except for what the arms, seeds and tuning vary. Its `steps` are N.
        arms: the arms to compare. The first is the baseline, which is also trained for the other `horizons`.
        seeds: the seeds to train every arm with. A seed determines initial weights and data order, so runs of
            different arms are paired by seed.
        base_lrs: base learning rates to tune every series over, with the first seed. Default: use `tuned`.
        tuned: {"optimizer:ratios:horizon": setting that was tuned beforehand}. If both this and `base_lrs` are None,
            all arms use the learning rate of `base`, and the report says that nothing was tuned.
        horizons: run lengths of the baseline, as keys of `HORIZONS`; "N" is required, and speed-ups need "2N".
        warmups: warm-ups to try with each of `base_lrs`, as fractions of the steps. Default: that of `base`.
        refine: whether every series also tries its best base learning rate multiplied and divided by sqrt(2).

    Raises:
        UserError: a setting is unknown, missing, duplicated or out of range.
    """

    base: TrainConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    base_lrs: tuple[float, ...] | None = None
    tuned: Mapping[str, Setting] | None = None
    horizons: tuple[str, ...] = ("N", "2N")
    warmups: tuple[float, ...] | None = None
    refine: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", tuple(map(resolve_arm, self.arms)))
        _check_values(self)
        if self.base_lrs is None:
            self.choose({})  # raises an error for an arm without a tuned setting

    @property
    def tunes(self) -> bool:
        """Whether every series tries more than one setting."""
        return len(self.base_lrs or ()) * len(self.warmups or (None,)) > 1 or self.refine

    @property
    def series(self) -> list[Series]:
        """The baseline at every horizon, N first, followed by the other arms at N."""
        horizons = sorted(self.horizons, key=lambda h: (h != "N", HORIZONS[h]))
        baseline = [self._series(self.arms[0], horizon) for horizon in horizons]
        return baseline + [self._series(arm, "N") for arm in self.arms[1:]]

    def _series(self, arm: Arm, horizon: str) -> Series:
        name = arm.name if horizon == "N" else f"{arm.name} {horizon}"
        return Series(name, arm, horizon, round(self.base.steps * HORIZONS[horizon]))

    def tuning_runs(self) -> list[Run]:
        """Return the runs of the grid: the same settings for every series, with the first seed."""
        grid = [Setting(lr, warmup) for warmup in self.warmups or (None,) for lr in self.base_lrs or ()]
        return [self._run(series, setting, self.seeds[0]) for series in self.series for setting in grid]

    def refining_runs(self, tune_losses: Mapping[Run, float]) -> list[Run]:
        """Return two more tuning runs for every series, on both sides of its best run; empty without `refine`.

        If the best run is at the edge of the grid, one of the two is outside the grid, so that the best run has a
        neighbour on both sides.

        Args:
            tune_losses: terminal loss on the tune split of each tuning run.
        """
        if not self.refine:
            return []
        runs = []
        for name, best in self.choose(tune_losses).items():
            series = next(s for s in self.series if s.name == name)
            for lr in (best.base_lr / math.sqrt(2), best.base_lr * math.sqrt(2)):
                near = dataclasses.replace(best, base_lr=float(f"{lr:.3g}"))
                runs.append(self._run(series, near, self.seeds[0]))
        return runs

    def final_runs(self, chosen: Mapping[str, Setting]) -> list[Run]:
        """Return the runs of every seed of every series at its chosen setting ({series name: setting})."""
        return [self._run(series, chosen[series.name], seed) for series in self.series for seed in self.seeds]

    def choose(self, tune_losses: Mapping[Run, float]) -> dict[str, Setting]:
        """Choose the setting of every series.

        With a grid, it is the setting of the run with the lowest loss, or of the smaller learning rate in a tie.
        Without a grid, it is the setting that was tuned beforehand.

        Args:
            tune_losses: terminal loss on the tune split of each tuning run; +inf for a run that diverged.

        Returns:
            {series name: setting}.
        """
        if self.base_lrs is None:
            return {series.name: self._fixed_setting(series) for series in self.series}
        return {series.name: self._best(series, tune_losses) for series in self.series}

    def _best(self, series: Series, tune_losses: Mapping[Run, float]) -> Setting:
        return min((loss, run.setting) for run, loss in tune_losses.items() if run.series == series)[1]

    def _fixed_setting(self, series: Series) -> Setting:
        if self.tuned is None:
            return Setting(self.base.optim.base_lr)
        key = f"{series.arm.optimizer}:{series.arm.ratios}:{series.horizon}"
        if key not in self.tuned:
            raise UserError(
                f"no base learning rate was tuned for {key} in preset {self.base.preset!r} "
                f"(known: {', '.join(sorted(self.tuned)) or 'none'}); tune every arm with --base-lrs X X X"
            )
        return self.tuned[key]

    def _run(self, series: Series, setting: Setting, seed: int) -> Run:
        optim = dataclasses.replace(
            self.base.optim,
            optimizer=series.arm.optimizer,
            ratios=series.arm.ratios,
            base_lr=float(setting.base_lr),
        )
        if setting.warmup_fraction is not None:
            optim = dataclasses.replace(optim, warmup_fraction=setting.warmup_fraction, warmup_steps=None)
        config = dataclasses.replace(self.base, steps=series.steps, seed=seed, optim=optim)
        return Run(series, setting, config, run_folder(config))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Return the plan from the data of `to_dict`."""
        lrs, warmups = values["base_lrs"], values.get("warmups")
        return cls(
            base=config_from_dict(values["base"]),
            arms=tuple(Arm(**arm) for arm in values["arms"]),
            seeds=tuple(values["seeds"]),
            base_lrs=None if lrs is None else tuple(lrs),
            tuned=None if values["tuned"] is None else {k: Setting(**v) for k, v in values["tuned"].items()},
            horizons=tuple(values["horizons"]),
            warmups=None if warmups is None else tuple(warmups),
            refine=values.get("refine", False),
        )


def run_folder(config: TrainConfig) -> str:
    """Return the name of a run's folder: a description, and a hash of all settings that can change its numbers.

    Example:
        >>> run_folder(TrainConfig())[:-8]
        'adamw-half-400steps-lr0.0006-seed0-'
    """
    optim = config.optim
    what = f"{optim.optimizer}-{optim.ratios}-{config.steps}steps-lr{optim.base_lr:g}-seed{config.seed}"
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', what)}-{digest}"


def _check_values(plan: Plan) -> None:
    """Raise UserError unless every setting of a plan is valid."""
    if len(plan.arms) < 2:
        raise UserError(
            f"a comparison needs a baseline and at least one other arm; got {len(plan.arms)}: "
            f"add one to --arms, such as adamw:half"
        )
    if plan.base.steps < 2:
        raise UserError(f"a comparison needs at least 2 steps; got {plan.base.steps}: raise --steps")
    names = [series.name for series in plan.series]
    for what, values in (
        ("arm name", names),
        ("seed", plan.seeds),
        ("base learning rate", plan.base_lrs or ()),
        ("warm-up", plan.warmups or ()),
    ):
        repeated = sorted({str(value) for value in values if list(values).count(value) > 1})
        if repeated:
            raise UserError(f"each {what} may be given once; given more than once: {', '.join(repeated)}")
    from blockwise_lr.train.checks import check_optimizer  # imported here because it loads transformers
    from blockwise_lr.train.ranges import check_seed

    for arm in plan.arms:
        try:
            check_optimizer(dataclasses.replace(plan.base.optim, optimizer=arm.optimizer))
        except UserError as error:
            raise UserError(f"arm {arm.name!r}: {error}") from None
    contents = [
        (arm.optimizer, resolve_ratios(parse_ratios(arm.ratios)), parse_moving(arm.ratios))
        for arm in plan.arms
    ]
    for i, arm in enumerate(plan.arms):
        if contents[i] in contents[:i]:
            raise UserError(f"two arms are both {arm.optimizer}:{arm.ratios}; leave one out")
    if not plan.seeds:
        raise UserError("no seeds were given; give at least one, such as --seeds 0 1 2")
    for seed in plan.seeds:
        check_seed(seed, "a seed in --seeds")
    if len(plan.seeds) > 1 and plan.base.init_seed is not None and plan.base.data_seed is not None:
        raise UserError(
            f"--init-seed {plan.base.init_seed} and --data-seed {plan.base.data_seed} are both fixed, so that "
            f"{len(plan.seeds)} seeds would repeat one run; leave one of them unset, or give one seed"
        )
    if plan.base_lrs is not None and not plan.base_lrs:
        raise UserError("--base-lrs was given without values; give at least one, or leave it out")
    for flag, given in (("--warmups", plan.warmups is not None), ("--refine", plan.refine)):
        if given and plan.base_lrs is None:
            raise UserError(
                f"{flag} is part of the tuning: give the grid too, such as --base-lrs 1e-3 2e-3 4e-3"
            )
    if plan.warmups is not None and not plan.warmups:
        raise UserError("--warmups was given without values; give at least one, or leave it out")
    for warmup in plan.warmups or ():
        if not 0 <= warmup < 1:
            raise UserError(
                f"a warm-up is a share of the steps, from 0 to below 1; got {warmup:g} in --warmups"
            )
    for lr in [*(plan.base_lrs or ()), *(setting.base_lr for setting in (plan.tuned or {}).values())]:
        if not (math.isfinite(lr) and lr > 0):
            raise UserError(f"a base learning rate must be a positive number; got {lr:g}")
    if not {"N"} <= set(plan.horizons) <= set(HORIZONS):
        raise UserError(f"the baseline's horizons must hold N and be of {', '.join(HORIZONS)}; "
                        f"got {', '.join(plan.horizons)}")  # fmt: skip
