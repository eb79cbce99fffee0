"""Going on from a whole checkpoint: that it fits the run, and that all processes take the same."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from blockwise_lr.checkpoints.manifest import checkpoint_step
from blockwise_lr.errors import UserError
from blockwise_lr.reason import reason
from blockwise_lr.train.lost_process import is_lost_connection

STATES = ("optimizer.pt", "scheduler.pt")
"""Trainer begins these anew, without a word, where one is missing."""


@contextmanager
def loading(checkpoint: str | Path) -> Iterator[None]:
    """One line for whatever does not fit while a whole checkpoint is loaded.

    Raises:
        UserError: it holds something else than the run's model and optimizer, or cannot be read.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise UserError(f"{checkpoint} cannot be read: {reason(error)}") from error
    except Exception as error:  # torch, safetensors, pickle and transformers each raise their own
        if isinstance(error, RuntimeError) and is_lost_connection(error):
            raise
        raise UserError(
            f"{checkpoint} does not fit the run's model and optimizer: {reason(error).rstrip('.')}; if it was "
            "changed since, or saved by another version, delete it to go on from the one before"
        ) from error


def check_weights(missing: Collection[str], unexpected: Collection[str], tied: Collection[str]) -> None:
    """Refuse weights of other names than the model's: what is missing would go on from random numbers.

    Args:
        missing: names of the model that the file lacks.
        unexpected: names in the file that the model lacks.
        tied: names of the model that are others by another name, and so may be missing.

    Raises:
        ValueError: there are some.
    """
    if lacking := sorted(set(missing).difference(tied)):
        raise ValueError(f"its file has no {lacking[0]}")
    if unexpected:
        raise ValueError(f"its file has {min(unexpected)}, which the model lacks")


def check_states(checkpoint: str | Path) -> None:
    """Refuse a checkpoint without the optimizer's state or the schedule's. Raises ValueError."""
    for name in STATES:
        if not (Path(checkpoint) / name).is_file():
            raise ValueError(f"it has no {name}")


def check_same_start(checkpoint: Path | None, out: Path) -> None:
    """All processes compare the checkpoint that each has found.

    Raises:
        UserError: on every process, where they differ.
    """
    if not dist.is_initialized():
        return
    steps: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, checkpoint_step(checkpoint) if checkpoint else None)
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise UserError(
                f"process 0 would go on from {_start(steps[0])} of {out} and process {rank} from {_start(step)}: --out "
                "has to be one folder that all machines share, and to look the same on all of them"
            )


def _start(step: int | None) -> str:
    return "step 0" if step is None else f"checkpoint-{step}"
