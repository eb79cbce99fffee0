"""`blockwise-lr compare`: arms side by side, and a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from blockwise_lr.cli.flags import command_line, named_preset, needs, parse
from blockwise_lr.cli.interrupts import at_work
from blockwise_lr.errors import UserError
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.presets import arms_of, tuned_settings


@dataclass(frozen=True)
class CompareCommand:
    """Train a baseline for N and 2N steps and every other arm for N, and report loss gaps and speed-ups.

    --steps is N. Finished runs are kept: the same command goes on where it was interrupted.
    """

    out: Path
    """Folder of the comparison."""
    arms: tuple[str, ...]
    """What to compare, each OPTIMIZER:RATIOS or NAME=OPTIMIZER:RATIOS; the first is the baseline."""
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]
    seeds: tuple[int, ...] = (0,)
    """Seeds of every arm. With one, noise cannot be told from effect."""
    base_lrs: tuple[float, ...] = ()
    """Grid of base learning rates over which every arm is tuned; empty: those tuned for the preset, if there are."""
    warmups: tuple[float, ...] = ()
    """Warm-ups, as shares of the steps, that every arm tries with each base learning rate; empty: --warmup-fraction.
    A uniform learning rate often wants a longer one than blockwise learning rates: tuned for neither or for both."""
    refine: bool = False
    """After the grid, every arm also tries the base learning rates a factor of sqrt 2 on either side of its best."""
    jobs: int = 0
    """Runs at the same time; 0: one a CPU core for models below 10M parameters on the CPU, otherwise 1."""


def run(arguments: list[str]) -> None:
    preset, rest = named_preset("compare", arguments)
    default = CompareCommand(Path("runs") / f"compare-{preset.preset}", arms_of(preset.preset), preset)
    parsed = parse(CompareCommand, f"compare {preset.preset}", rest, default)
    needs("compare", "scipy", "matplotlib", "jinja2")
    from blockwise_lr.compare import Arm, compare
    from blockwise_lr.compare.tables import print_summary
    from blockwise_lr.train.checks import check_config

    at_work()
    # What an arm or a seed decides cannot also be a setting of the comparison.
    for flag, given, default_value, instead in (
        ("--seed", parsed.config.seed, preset.seed, "--seeds 0 1 2"),
        ("--ratios", parsed.config.optim.ratios, preset.optim.ratios, "--arms adamw:uniform adamw:paper"),
        (
            "--optimizer",
            parsed.config.optim.optimizer,
            preset.optim.optimizer,
            "--arms adamw:uniform nadamw:uniform",
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
        jobs=parsed.jobs or _default_jobs(config),
        command=command_line("compare", arguments),
    )
    print_summary(content, parsed.out)


def _default_jobs(config: TrainConfig) -> int:
    """Small models do not fill two cores: as many single-threaded runs as cores finish sooner."""
    from blockwise_lr.compare.execute import available_cores
    from blockwise_lr.train.build_model import count_parameters

    small = count_parameters(config.model) < 10_000_000
    return available_cores() if small and config.device == "cpu" else 1
