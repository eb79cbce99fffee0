"""`blockwise-lr generate`: a sample from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from blockwise_lr.cli.flags import parse
from blockwise_lr.cli.interrupts import at_work


@dataclass(frozen=True)
class GenerateCommand:
    """A sample from a run's newest checkpoint, from one checkpoint, or from a Hugging Face folder, behind a prompt."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, one of its checkpoints, or folder of a Hugging Face model."""
    prompt: str = ""
    """The text to go on with; empty: the beginning of a document."""
    tokens: int | None = None
    """Tokens to sample at most (the end of the document ends it); None: 100, or as many as fit into the context."""
    temperature: float = 1.0
    """Divides the logits; 0: always the likeliest token."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0: among all."""
    seed: int = 0
    """Seed of the sampling: the same seed gives the same text."""
    tokenizer: str | None = None
    """Id or folder of a Hugging Face tokenizer; None: the model's own."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where to sample; "auto": a GPU if there is one."""


def run(arguments: list[str]) -> None:
    parsed = parse(GenerateCommand, "generate", arguments)
    from blockwise_lr.analysis.generate import generate
    from blockwise_lr.train.settings import resolve_device

    at_work()
    text = generate(
        parsed.run,
        parsed.prompt,
        tokens=parsed.tokens,
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        seed=parsed.seed,
        tokenizer=parsed.tokenizer,
        device=resolve_device(parsed.device),
    )
    print(text)
