"""The commands that train, and the table of all commands. Their flags are the fields of the dataclasses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from blockwise_lr.extras import check

try:
    check("the command line needs", ("tyro", "rich", "filelock", "transformers", "accelerate", "tokenizers"))
except ImportError as error:
    print(f"blockwise-lr: {error}", file=sys.stderr)
    raise SystemExit(2) from None

import tyro

from blockwise_lr.cli_flags import command_line, named_preset, needs, parse
from blockwise_lr.cli_models import run_eval, run_export, run_generate, run_inspect, run_sharpness
from blockwise_lr.entry import at_work, main
from blockwise_lr.errors import LostProcessError, Terminated, UserError
from blockwise_lr.pretrain.config import TrainConfig
from blockwise_lr.pretrain.presets import PRESETS, arms_of, tuned_settings

__all__ = ["COMMANDS", "main"]


@dataclass(frozen=True)
class TrainCommand:
    """Pre-train one model. A folder that holds an unfinished run of the same configuration is resumed."""

    out: Path
    """Folder of the run."""
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]


def _train(arguments: list[str]) -> None:
    preset, rest = named_preset("train", arguments)
    default = TrainCommand(Path("runs") / preset.preset, preset)
    parsed = parse(TrainCommand, f"train {preset.preset}", rest, default)
    from blockwise_lr.pretrain.allocator import keep_freed_memory
    from blockwise_lr.pretrain.lost import is_first_to_report
    from blockwise_lr.pretrain.run import train

    if parsed.config.device != "cuda":  # "auto" may be either: harmless where a GPU does the work
        keep_freed_memory()
    at_work()
    try:
        result = train(parsed.config, parsed.out, command=command_line("train", arguments))
    except Terminated:
        _leave_processes()
        raise
    except LostProcessError:
        if not is_first_to_report(parsed.out):
            raise SystemExit(1) from None
        raise
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{parsed.out}: {result['steps']} steps, val loss {result['terminal_val_loss']:.4f}, "
            f"tune loss {result['terminal_tune_loss']:.4f}, {result['seconds']:.0f} s"
        )
    _leave_processes()


def _leave_processes() -> None:
    """End torch.distributed, which Trainer started: left open, its threads abort the exit once in a while."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()  # one that is gone while another still listens aborts that one
        dist.destroy_process_group()


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


def _compare(arguments: list[str]) -> None:
    preset, rest = named_preset("compare", arguments)
    default = CompareCommand(Path("runs") / f"compare-{preset.preset}", arms_of(preset.preset), preset)
    parsed = parse(CompareCommand, f"compare {preset.preset}", rest, default)
    needs("compare", "scipy", "matplotlib", "jinja2")
    from blockwise_lr.compare import Arm, compare
    from blockwise_lr.compare.tables import print_summary
    from blockwise_lr.pretrain.checks import check_config

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
    from blockwise_lr.pretrain.models import count_parameters

    small = count_parameters(config.model) < 10_000_000
    return available_cores() if small and config.device == "cpu" else 1


def _presets(arguments: list[str]) -> None:
    if arguments in (["-h"], ["--help"]):
        print(
            "usage: blockwise-lr presets\n\nPrint the name of every preset, with its model, steps and text."
        )
        return
    if arguments:
        raise UserError(f"presets takes no arguments; got {' '.join(arguments)}")
    for name, config in PRESETS.items():
        model = config.model
        print(
            f"{name:<28} {model.family} {model.layers}x{model.hidden_size}, {config.steps:,} steps, {config.data.data}"
        )


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "compare": _compare,
    "eval": run_eval,
    "generate": run_generate,
    "export": run_export,
    "sharpness": run_sharpness,
    "inspect": run_inspect,
    "presets": _presets,
}
