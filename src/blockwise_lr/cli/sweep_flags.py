"""The flags and the body of `blockwise-lr robustness` and `blockwise-lr ablation`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from blockwise_lr.cli.flags import command_line, named_preset, needs, parse
from blockwise_lr.cli.interrupts import end_startup
from blockwise_lr.errors import UserError
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.presets import tuned_settings

if TYPE_CHECKING:
    from blockwise_lr.compare.ratio_sweeps import Kind


@dataclass(frozen=True)
class SweepCommand:
    """Train the arms of a sweep over ratios, and report how the loss changes. Finished runs are kept."""

    out: Path
    """Folder for the runs and the report."""
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]
    seeds: tuple[int, ...] = (0,)
    """Seeds to train every arm with. One seed cannot separate an effect from noise."""
    base_lrs: tuple[float, ...] = ()
    """Grid of base learning rates over which every arm is tuned. Empty: all arms have the rate that was tuned for
    --ratios with the preset, or else --base-lr."""
    warmups: tuple[float, ...] = ()
    """Warm-ups that every arm tries with each base learning rate, as fractions of the steps."""
    refine: bool = False
    """After the grid, every arm also tries its best base learning rate divided by sqrt 2 and multiplied by sqrt 2."""
    jobs: int = 0
    """Number of runs in parallel. 0: one per CPU core for models below 10M parameters on the CPU, otherwise 1."""


def run_sweep_command(kind: Kind, arguments: list[str]) -> None:
    """Run one of the two commands with the arguments that follow its name."""
    preset, rest = named_preset(kind, arguments)
    default = SweepCommand(Path("runs") / f"{kind}-{preset.preset}", preset)
    parsed = parse(SweepCommand, f"{kind} {preset.preset}", rest, default)
    needs(kind, "scipy", "matplotlib")
    from blockwise_lr.compare.execute import default_jobs
    from blockwise_lr.compare.ratio_sweeps import ablation_points, blocks_of, robustness_points, sweep_plan
    from blockwise_lr.compare.sweep_report import run_sweep
    from blockwise_lr.train.checks import check_config

    end_startup()
    if parsed.config.seed != preset.seed:
        raise UserError(f"--seed {parsed.config.seed} belongs to train; {kind} takes it as --seeds 0 1 2")
    config = check_config(parsed.config)
    make = robustness_points if kind == "robustness" else ablation_points
    points = make(config.optim.optimizer, config.optim.ratios, blocks_of(config.model))
    plan = sweep_plan(
        config,
        points,
        seeds=parsed.seeds,
        base_lrs=parsed.base_lrs or None,
        warmups=parsed.warmups or None,
        refine=parsed.refine,
        tuned=tuned_settings(config),
    )
    jobs = parsed.jobs or default_jobs(config)
    run_sweep(kind, plan, points, parsed.out, jobs=jobs, command=command_line(kind, arguments))
    print(f"Report: {parsed.out / 'report.md'}")
