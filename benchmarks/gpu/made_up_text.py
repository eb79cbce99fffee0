"""Text for parts that measure time and equality: phrases that repeat, so that a loss falls on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_text(folder: Path, *, tiny: bool) -> Path:
    """Write train.bin and val.bin as nanoGPT does and return the folder.

    Args:
        folder: for the files.
        tiny: a vocabulary of 64 tokens, and few of them.
    """
    rng = np.random.default_rng(0)
    vocabulary, phrases, tokens = (64, 8, 40_000) if tiny else (8192, 2048, 2_000_000)
    table = rng.integers(vocabulary, size=(phrases, 8), dtype=np.uint16)
    for name, count in (("train.bin", tokens), ("val.bin", tokens // 2)):
        table[rng.integers(phrases, size=count // 8)].tofile(folder / name)
    return folder
