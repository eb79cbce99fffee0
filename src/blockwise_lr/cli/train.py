"""`blockwise-lr train`: one training run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from blockwise_lr.cli.flags import command_line, named_preset, parse
from blockwise_lr.cli.interrupts import at_work
from blockwise_lr.errors import LostProcessError, Terminated
from blockwise_lr.train.config import TrainConfig


@dataclass(frozen=True)
class TrainCommand:
    """Pre-train one model. A folder that holds an unfinished run of the same configuration is resumed."""

    out: Path
    """Folder of the run."""
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]


def run(arguments: list[str]) -> None:
    preset, rest = named_preset("train", arguments)
    default = TrainCommand(Path("runs") / preset.preset, preset)
    parsed = parse(TrainCommand, f"train {preset.preset}", rest, default)
    from blockwise_lr.train.allocator import keep_freed_memory
    from blockwise_lr.train.lost_process import is_first_to_report
    from blockwise_lr.train.run import train

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
