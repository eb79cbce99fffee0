"""Check that the counts, sizes and seeds of a configuration are in range."""

from __future__ import annotations

import math

from blockwise_lr.errors import UserError
from blockwise_lr.train.build_model import LARGEST
from blockwise_lr.train.config import TrainConfig

LARGEST_SEED = 2**32 - 1
"""The largest seed that numpy accepts."""


def check_ranges(config: TrainConfig) -> None:
    """Check the counts, sizes and seeds of a configuration, except the model's, which `build_model` checks.

    Raises:
        UserError: a number is out of range; names its flag.
    """
    for name in ("steps", "batch_size", "accumulation", "log_every", "keep_checkpoints"):
        if not 1 <= (value := getattr(config, name)) <= LARGEST:
            more = f", {LARGEST} at most" if value > 0 else ""
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected 1 or more{more}")
    if not 2 <= config.model.context <= LARGEST:
        raise UserError(
            f"--context is {config.model.context}; expected 2 or more, so that there is a token to predict"
        )
    for name in ("save_every", "eval_every"):
        value = getattr(config, name)
        if value < 0 or value % config.log_every:
            # Otherwise a resumed run's first logged loss would be a mean over fewer steps.
            raise UserError(
                f"--{name.replace('_', '-')} is {value}; expected 0 or a multiple of --log-every ({config.log_every})"
            )
    for name, number in {"eval-tokens": config.eval_tokens, "clip": config.optim.clip}.items():
        if not (math.isfinite(number) and number >= 0):
            raise UserError(f"--{name} is {number}; expected 0 or more")
    for name in ("seed", "init_seed", "data_seed"):
        if getattr(config, name) is not None:
            check_seed(getattr(config, name), f"--{name.replace('_', '-')}")


def check_seed(seed: int, flag: str) -> None:
    """Check that numpy's and torch's random generators accept a seed.

    Raises:
        UserError: the seed is out of range; names `flag`.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"{flag} is {seed}; expected 0 or more, {LARGEST_SEED} at most")
