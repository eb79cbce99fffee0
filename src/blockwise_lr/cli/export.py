"""The command `blockwise-lr export`: write a checkpoint as a plain Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from blockwise_lr.cli.flags import parse
from blockwise_lr.cli.interrupts import end_startup


@dataclass(frozen=True)
class ExportCommand:
    """Write the model of a checkpoint as a plain folder in its original layout, however many processes saved it."""

    checkpoint: tyro.conf.Positional[Path]
    """A sharded checkpoint, a run's folder (its newest checkpoint is exported), or one of its checkpoints."""
    out: Path
    """The folder to write."""
    to: Literal["huggingface"] = "huggingface"
    """The format to write; "huggingface" loads with transformers' from_pretrained."""


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    parsed = parse(ExportCommand, "export", arguments)
    from blockwise_lr.checkpoints.hugging_face import export_checkpoint

    end_startup()
    print(f"{parsed.out}: the model of {export_checkpoint(parsed.checkpoint, parsed.out)}")
