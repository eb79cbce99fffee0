"""The flags and the body of `blockwise-lr robustness` and `blockwise-lr ablation`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from blockwise_lr.cli.flags import command_line, named_preset, needs, parse
from blockwise_lr.cli.interrupts import end_startup
from blockwise_lr.errors import UserError
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.presets import tuned_settings

if TYPE_CHECKING:
    from blockwise_lr.compare.ratio_sweeps import Kind, Point
    from blockwise_lr.compare.sweep_plan import SweepPlan


@dataclass(frozen=True)
class SweepCommand:
    """Train the arms of a sweep over --ratios and a uniform baseline, and report how the loss changes.

    --seeds sets the seeds: --seed is refused. Finished runs are kept, so the same command resumes an interrupted sweep.
    """

    out: Path
    """Folder for the runs and the report."""
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]
    seeds: tuple[int, ...] = (0,)
    """Seeds to train every arm with. One seed cannot separate an effect from noise."""
    base_lrs: tuple[float, ...] = ()
    """Grid of base learning rates over which arms are tuned. Empty: the rates that were tuned for --ratios and for
    uniform with the preset, or else --base-lr."""
    warmups: tuple[float, ...] = ()
    """Warm-ups to try with each base learning rate, as fractions of the steps. Empty: --warmup-fraction."""
    refine: bool = False
    """After the grid, also try the best base learning rate divided by sqrt 2 and multiplied by sqrt 2."""
    tune_arms: Literal["references", "all"] = "references"
    """Arms that the grid tunes. "references": --ratios and uniform; the other arms have the setting of --ratios, so
    that nothing but their ratios changes. "all": every arm, which needs many runs."""
    jobs: int = 0
    """Number of runs in parallel. 0: one per CPU core for models below 10M parameters on the CPU, otherwise 1."""
    dry_run: bool = False
    """Print the number of runs and an estimate of the time, and train nothing."""


def run_sweep_command(kind: Kind, arguments: list[str]) -> None:
    """Run one of the two commands with the arguments that follow its name."""
    preset, rest = named_preset(kind, arguments)
    default = SweepCommand(Path("runs") / f"{kind}-{preset.preset}", preset)
    parsed = parse(SweepCommand, f"{kind} {preset.preset}", rest, default)
    needs(kind, "scipy", "matplotlib", "jinja2")
    from blockwise_lr.compare.execute import default_jobs
    from blockwise_lr.compare.printed_answer import print_answer
    from blockwise_lr.compare.sweep_plan import finished_runs
    from blockwise_lr.compare.sweep_report import run_sweep
    from blockwise_lr.compare.time_estimate import estimate
    from blockwise_lr.train.checks import check_config

    end_startup()
    if parsed.config.seed != preset.seed:
        raise UserError(f"--seed {parsed.config.seed} belongs to train; {kind} takes it as --seeds 0 1 2")
    config = check_config(parsed.config)
    plan, points = planned(kind, parsed, config, preset)
    jobs = parsed.jobs or default_jobs(config)
    done = finished_runs(plan, parsed.out)
    print(estimate(config, arms=len(plan.arms), runs=plan.runs_in_all, done=done, jobs=jobs), flush=True)
    if parsed.dry_run:
        return
    content = run_sweep(kind, plan, points, parsed.out, jobs=jobs, command=command_line(kind, arguments))
    print_answer(content, parsed.out)


def planned(
    kind: Kind, parsed: SweepCommand, config: TrainConfig, preset: TrainConfig
) -> tuple[SweepPlan, list[Point]]:
    """Return the runs of a command, and the points of its sweep."""
    from blockwise_lr.compare.ratio_sweeps import ablation_points, blocks_of, robustness_points
    from blockwise_lr.compare.sweep_plan import sweep_plan

    make = robustness_points if kind == "robustness" else ablation_points
    points = make(config.optim.optimizer, config.optim.ratios, blocks_of(config.model))
    # Settings are tuned by the name of the ratios: --ratios chooses among them.
    as_tuned = replace(config, optim=replace(config.optim, ratios=preset.optim.ratios))
    plan = sweep_plan(
        config,
        points,
        seeds=parsed.seeds,
        base_lrs=parsed.base_lrs or None,
        warmups=parsed.warmups or None,
        refine=parsed.refine,
        tuned=tuned_settings(as_tuned),
        tune=parsed.tune_arms,
    )
    return plan, points
