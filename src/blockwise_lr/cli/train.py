"""The command `blockwise-lr train`: run or resume one training run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from blockwise_lr.cli.flags import command_line, named_preset, parse
from blockwise_lr.cli.interrupts import end_startup
from blockwise_lr.errors import LostProcessError, Terminated
from blockwise_lr.train.config import TrainConfig


@dataclass(frozen=True)
class TrainCommand:
    """Pre-train one model. If --out holds an unfinished run of the same configuration, resume it."""

    out: Path
    """Folder for the run."""
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    preset, rest = named_preset("train", arguments)
    default = TrainCommand(Path("runs") / preset.preset, preset)
    parsed = parse(TrainCommand, f"train {preset.preset}", rest, default)
    from blockwise_lr.train.allocator import keep_freed_memory
    from blockwise_lr.train.lost_process import is_first_to_report
    from blockwise_lr.train.run import train

    if parsed.config.device != "cuda":  # "auto" may choose the CPU; on a GPU this does no harm
        keep_freed_memory()
    end_startup()
    try:
        result = train(parsed.config, parsed.out, command=command_line("train", arguments))
    except Terminated:
        _leave_process_group()
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
    _leave_process_group()


def _leave_process_group() -> None:
    """Destroy the process group that Trainer started; otherwise its threads sometimes abort the process at exit."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()  # a rank that leaves while another still communicates would abort the other
        dist.destroy_process_group()
