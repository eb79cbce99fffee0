"""The command `blockwise-lr tune`: search the learning-rate ratios of a model on a small proxy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from blockwise_lr.cli.flags import command_line, named_preset, needs, parse
from blockwise_lr.cli.interrupts import end_startup
from blockwise_lr.train.config import TrainConfig


@dataclass(frozen=True)
class TuneCommand:
    """Search base learning rate, warm-up and the ratio of every block on a small proxy of the model.

    The search starts from the best known ratios, and tunes uniform first. It writes ratios.json, tune.json and a report
    into --out. --base-lr is the uniform learning rate to begin with; --warmup-fraction has no effect. Finished trials
    are kept, so the same command resumes an interrupted search, and a larger --trials continues a finished one.
    """

    out: Path
    """Folder for the trials and the report."""
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]
    trials: int = 40
    """Number of training runs of the search. A fifth of them tune the uniform learning rate."""
    proxy: str = "auto"
    """The model to train in the trials: WIDTHxLAYERS such as 128x4; "none": the model itself; "auto": about 2M
    parameters, or the model itself if it is not much larger."""
    sampler: Literal["auto", "trust-region", "tpe", "cma-es"] = "auto"
    """How trials are chosen: random search around the best trial ("trust-region"), optuna's TPE, or CMA-ES. "auto":
    trust-region."""
    early_end: bool = True
    """End a run that is clearly lost before its last step."""
    repeats: int = 3
    """Number of seeds for the gain over the tuned uniform learning rate, the search's own included."""
    workers: int = 0
    """Number of trials in parallel. 0: one per CPU core on the CPU, otherwise 1."""


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    preset, rest = named_preset("tune", arguments)
    default = TuneCommand(Path("runs") / f"tune-{preset.preset}", preset)
    parsed = parse(TuneCommand, f"tune {preset.preset}", rest, default)
    needs("tune", "scipy", "matplotlib", "jinja2")
    from blockwise_lr.compare.execute import available_cores
    from blockwise_lr.train.checks import check_config
    from blockwise_lr.tune.early_end import DEFAULT_RULE
    from blockwise_lr.tune.search_plan import SearchPlan
    from blockwise_lr.tune.search_report import print_summary
    from blockwise_lr.tune.tuning import tune

    end_startup()
    config = check_config(parsed.config)
    plan = SearchPlan(
        config,
        trials=parsed.trials,
        sampler=parsed.sampler,
        proxy=parsed.proxy,
        repeats=parsed.repeats,
        early_end=DEFAULT_RULE if parsed.early_end else None,
    )
    workers = parsed.workers or (available_cores() if config.device == "cpu" else 1)
    content = tune(plan, parsed.out, workers=workers, command=command_line("tune", arguments))
    print_summary(content, parsed.out)
