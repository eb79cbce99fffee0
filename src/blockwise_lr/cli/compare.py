"""The command `blockwise-lr compare`: train several arms and report how they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from blockwise_lr.cli.flags import command_line, named_preset, needs, parse
from blockwise_lr.cli.interrupts import end_startup
from blockwise_lr.errors import UserError
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.presets import arms_of, tuned_settings


@dataclass(frozen=True)
class CompareCommand:
    """Train the baseline for N and 2N steps and every other arm for N steps; report loss gaps and speed-ups.

    N is --steps. The arms set the optimizer and the ratios, and --seeds the seeds: --optimizer, --ratios and --seed are
    refused. Finished runs are kept, so the same command resumes an interrupted comparison.
    """

    out: Path
    """Folder for the runs and the report."""
    arms: tuple[str, ...]
    """Arms to compare, each OPTIMIZER:RATIOS or NAME=OPTIMIZER:RATIOS. The first is the baseline."""
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]
    seeds: tuple[int, ...] = (0,)
    """Seeds to train every arm with. One seed cannot separate an effect from noise."""
    base_lrs: tuple[float, ...] = ()
    """Grid of base learning rates over which every arm is tuned. Empty: the rates that come with the preset, if any."""
    warmups: tuple[float, ...] = ()
    """Warm-ups that every arm tries with each base learning rate, as fractions of the steps. Empty: --warmup-fraction.
    A uniform learning rate often needs a longer warm-up than blockwise learning rates, so tune it for all or none."""
    refine: bool = False
    """After the grid, every arm also tries its best base learning rate divided by sqrt 2 and multiplied by sqrt 2."""
    jobs: int = 0
    """Number of runs in parallel. 0: one per CPU core for models below 10M parameters on the CPU, otherwise 1."""


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    preset, rest = named_preset("compare", arguments)
    default = CompareCommand(Path("runs") / f"compare-{preset.preset}", arms_of(preset.preset), preset)
    parsed = parse(CompareCommand, f"compare {preset.preset}", rest, default)
    needs("compare", "scipy", "matplotlib", "jinja2")
    from blockwise_lr.compare import Arm, compare
    from blockwise_lr.compare.execute import default_jobs
    from blockwise_lr.compare.tables import print_summary
    from blockwise_lr.train.checks import check_config

    end_startup()
    # The arms and --seeds set these three for every run, so a common value would have no effect.
    optim = parsed.config.optim
    for flag, given, default_value, instead in (
        ("--seed", parsed.config.seed, preset.seed, "--seeds 0 1 2"),
        ("--ratios", optim.ratios, preset.optim.ratios, f"--arms adamw:uniform adamw:{optim.ratios}"),
        (
            "--optimizer",
            optim.optimizer,
            preset.optim.optimizer,
            f"--arms {optim.optimizer}:uniform {optim.optimizer}:half",
        ),
    ):
        if given != default_value:
            raise UserError(f"{flag} {given} belongs to train; compare takes it as {instead}")
    config = check_config(parsed.config)
    content = compare(
        config,
        [Arm.parse(arm) for arm in parsed.arms],
        seeds=parsed.seeds,
        base_lrs=parsed.base_lrs or None,
        tuned=tuned_settings(config),
        warmups=parsed.warmups or None,
        refine=parsed.refine,
        out=parsed.out,
        jobs=parsed.jobs or default_jobs(config),
        command=command_line("compare", arguments),
    )
    print_summary(content, parsed.out)
