"""Measure sharpness during a run: check its settings, choose its windows, build its callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from blockwise_lr.data.prepare import FixedWindows, TokenData
from blockwise_lr.data.shards import TokenShards
from blockwise_lr.errors import UserError
from blockwise_lr.integrations.sharpness_callback import SharpnessCallback
from blockwise_lr.sharpness.monitor import ON_BATCHES
from blockwise_lr.train.config import TrainConfig

SHARPNESS = "sharpness.jsonl"


def is_measured(config: TrainConfig) -> bool:
    """Return whether a run of `config` measures sharpness at any step."""
    return config.sharpness_every > 0 or bool(config.sharpness_at)


def check_measurements(config: TrainConfig) -> None:
    """Check the settings of sharpness measurements.

    Raises:
        UserError: a setting is out of range.
    """
    if config.sharpness_every < 0:
        raise UserError(f"--sharpness-every is {config.sharpness_every}; expected 0 or more")
    if config.sharpness_batches < 1:
        raise UserError(f"--sharpness-batches is {config.sharpness_batches}; expected 1 or more")
    for step in config.sharpness_at:
        if not 0 <= step <= config.steps:
            raise UserError(
                f"--sharpness-at names step {step}; expected 0 to {config.steps}, the run's steps"
            )
    estimators = config.sharpness_estimators
    if len(set(estimators)) < len(estimators) or (is_measured(config) and not estimators):
        raise UserError(
            f"--sharpness-estimators is {' '.join(estimators) or 'empty'}; expected one or more, each once"
        )


def measure_batches(
    shards: TokenShards, context: int, *, batches: int, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Return windows spread evenly over a split, as batches for ``measure_sharpness``.

    Args:
        shards: the split, usually ``data.measure``.
        context: length of a window, in tokens.
        batches: number of batches.
        batch_size: windows in each batch.

    Returns:
        ``{"input_ids", "labels"}``, each (batch_size, context) int64.

    Raises:
        UserError: the split holds fewer windows than the batches need.
    """
    needed, there = batches * batch_size, shards.n_windows(context)
    if needed > there:
        raise UserError(
            f"{batches} batches of {batch_size} windows to measure sharpness on are {needed}, but the split "
            f"{shards.split} of {shards.source} holds {there} windows of {context} tokens: "
            "measure on fewer batches, or give more text"
        )
    windows = FixedWindows(shards, context, max_tokens=needed * context)
    # Every batch spans the whole split, so that batches differ by chance and not by their position.
    return [default_collate([windows[i] for i in range(first, needed, batches)]) for first in range(batches)]


def masked_batches(
    data: TokenData, context: int, batches: int, batch_size: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Return batches for measuring a masked language model, with 15 % of the tokens masked as in BERT.

    Args:
        data: the text; its tokenizer must have a mask token.
        context: length of a window, in tokens, including special tokens such as [CLS] and [SEP].
        batches: number of batches.
        batch_size: windows in each batch.
        seed: seed of the choice of masked tokens.

    Returns:
        As :func:`measure_batches`.

    Raises:
        UserError: the tokenizer has no mask token, or as :func:`measure_batches`.
    """
    from transformers import DataCollatorForLanguageModeling

    tokenizer = data.tokenizer
    if tokenizer is None or tokenizer.mask_token_id is None:
        raise UserError(
            "a masked language model needs a tokenizer with a mask token: name its own by --tokenizer"
        )
    begin = [] if tokenizer.cls_token_id is None else [tokenizer.cls_token_id]
    end = [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
    inner = context - len(begin) - len(end)
    if inner < 1:
        raise UserError(f"--context is {context}; expected {len(begin) + len(end) + 1} or more")
    hide = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=seed)
    return [
        dict(hide([{"input_ids": [*begin, *window.tolist(), *end]} for window in batch["input_ids"]]))
        for batch in measure_batches(data.measure, inner, batches=batches, batch_size=batch_size)
    ]


def sharpness_callback(
    config: TrainConfig, out: Path, measure: TokenShards, *, processes: int
) -> SharpnessCallback | None:
    """Build the callback that measures sharpness during a run; None if the run does not measure.

    Args:
        config: the run's configuration.
        out: the run's folder.
        measure: the measure split.
        processes: number of ranks.

    Raises:
        UserError: the split is too small.
    """
    if not is_measured(config):
        return None
    batches: list[Any] | None = None
    if ON_BATCHES & set(config.sharpness_estimators):
        batches = measure_batches(
            measure,
            config.model.context,
            batches=config.sharpness_batches,
            batch_size=config.batch_size * processes,
        )
    sequences = config.batch_size * config.accumulation * processes
    return SharpnessCallback(
        batches,
        every=config.sharpness_every,
        at=config.sharpness_at,
        estimators=config.sharpness_estimators,
        tokens_per_step=sequences
        * (config.model.context - 1),  # the first token of a window is not predicted
        path=out / SHARPNESS,
    )
