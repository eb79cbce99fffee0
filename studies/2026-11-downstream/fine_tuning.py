"""Fine-tune a trained model on another kind of text: the source code of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from arms import Arm
from shapes import CONTEXT
from stacked import Stack, Text
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from tuning import Results, bracket

STEPS, ROWS = 60, 16
FIRST_RATE = 2e-3
"""Where the search for the learning rate begins."""


def source_files() -> list[Path]:
    """Return the modules at the top of Python's standard library, which ship with every Python."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def code_text(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Text:
    """Return windows of code, an end-of-text token before each document; of eight, one is for tune and one for val."""
    splits: dict[str, list[int]] = {"train": [], "tune": [], "val": []}
    for index, document in enumerate(documents):
        tokens = tokenizer.encode(document, add_special_tokens=False)
        splits[{2: "tune", 6: "val"}.get(index % 8, "train")] += [int(tokenizer.eos_token_id), *tokens]

    def windows(tokens: list[int]) -> Any:
        count = len(tokens) // CONTEXT
        return np.array(tokens[: count * CONTEXT], dtype=np.uint16).reshape(count, CONTEXT)

    return Text(windows(splits["train"]), windows(splits["tune"]), windows(splits["val"]))


def digest(text: Text) -> str:
    """Return a hash of the windows, by which results are known to be of the same ones."""
    parts = (text.train, text.tune, text.val)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:12]


def fine_tune(arm: Arm, weights: Mapping[str, Tensor], text: Text) -> dict[str, Any]:
    """Train from weights that are there, with AdamW at one learning rate, and return the result of the run."""
    return _started(arm, weights, text).run(points=6)[0]


def loss_before(arm: Arm, weights: Mapping[str, Tensor], text: Text) -> float:
    """Return the val loss on code without any training on it."""
    return round(_started(arm, weights, text).evaluate(text.val, 1024)[0], 5)


def _started(arm: Arm, weights: Mapping[str, Tensor], text: Text) -> Stack:
    stack = Stack([arm], text, rows=ROWS)
    stack.weights = {name: weights[name].unsqueeze(0).clone() for name in stack.weights}
    return stack


def tuned(
    first: Arm, weights: Mapping[str, Tensor], text: Text, done: dict[str, dict[str, Any]] | None = None
) -> tuple[Arm, dict[str, dict[str, Any]]]:
    """Return the fine-tuning with the lowest tune loss, over rates a factor of sqrt 2 apart, and all runs by name."""
    runs = {} if done is None else done
    while True:
        arms, best = bracket(first, Results(runs))
        missing = [arm for arm in arms if arm.name not in runs]
        if best is not None and not missing:
            return best, runs
        runs |= {arm.name: fine_tune(arm, weights, text) for arm in missing}
