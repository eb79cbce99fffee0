"""`blockwise-lr export`: a checkpoint as a plain Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from blockwise_lr.cli.flags import parse
from blockwise_lr.cli.interrupts import at_work


@dataclass(frozen=True)
class ExportCommand:
    """The model of a checkpoint as a plain folder, in the original layout, whatever the number of its processes."""

    checkpoint: tyro.conf.Positional[Path]
    """A sharded checkpoint, the folder of a run (its newest checkpoint), or one of its checkpoints."""
    out: Path
    """The new folder."""
    to: Literal["huggingface"] = "huggingface"
    """The format: what transformers' from_pretrained loads."""


def run(arguments: list[str]) -> None:
    parsed = parse(ExportCommand, "export", arguments)
    from blockwise_lr.checkpoints.hugging_face import export_checkpoint

    at_work()
    print(f"{parsed.out}: the model of {export_checkpoint(parsed.checkpoint, parsed.out)}")
