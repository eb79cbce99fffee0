"""The command `blockwise-lr generate`: sample text from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from blockwise_lr.cli.flags import parse
from blockwise_lr.cli.interrupts import end_startup


@dataclass(frozen=True)
class GenerateCommand:
    """Sample text that continues a prompt, from a run's newest checkpoint, one checkpoint, or a Hugging Face folder."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, of one of its checkpoints, or of a Hugging Face model."""
    prompt: str = ""
    """The text to continue. Empty: start a new document."""
    tokens: int | None = None
    """Largest number of tokens to sample; sampling stops at the end of the document. None: 100, or as many as fit."""
    temperature: float = 1.0
    """Sampling temperature, which divides the logits. 0: always take the likeliest token."""
    top_k: int = 0
    """Sample from this many likeliest tokens. 0: from all tokens."""
    seed: int = 0
    """Seed of the random sampling; the same seed gives the same text."""
    tokenizer: str | None = None
    """Id or folder of a Hugging Face tokenizer. None: the model's own."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Device to sample on; "auto": a GPU if there is one."""


def run(arguments: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    parsed = parse(GenerateCommand, "generate", arguments)
    from blockwise_lr.analysis.generate import generate
    from blockwise_lr.train.settings import resolve_device

    end_startup()
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
