"""Checks when a run resumes: the checkpoint fits the run, and all ranks resume from the same one."""

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
"""Files that a checkpoint must have, because Trainer silently starts without the state of a missing one."""


@contextmanager
def loading(checkpoint: str | Path) -> Iterator[None]:
    """Turn errors raised while a checkpoint is loaded into one-line messages.

    Args:
        checkpoint: the folder that the block loads.

    Raises:
        UserError: the checkpoint does not fit the run's model and optimizer, or cannot be read.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise UserError(f"{checkpoint} cannot be read: {reason(error)}") from error
    except Exception as error:  # torch, safetensors, pickle and transformers each raise their own classes
        if isinstance(error, RuntimeError) and is_lost_connection(error):
            raise
        raise UserError(
            f"{checkpoint} does not fit the run's model and optimizer: {reason(error).rstrip('.')}; if it was "
            "changed since, or saved by another version, delete it to go on from the one before"
        ) from error


def check_weights(missing: Collection[str], unexpected: Collection[str], tied: Collection[str]) -> None:
    """Check that a file has exactly the model's weights: a missing weight would keep its random initial values.

    Args:
        missing: the model's names that the file lacks.
        unexpected: names in the file that the model lacks.
        tied: the model's names of tied weights, which may be missing.

    Raises:
        ValueError: a name is missing or unexpected.
    """
    if lacking := sorted(set(missing).difference(tied)):
        raise ValueError(f"its file has no {lacking[0]}")
    if unexpected:
        raise ValueError(f"its file has {min(unexpected)}, which the model lacks")


def check_states(checkpoint: str | Path) -> None:
    """Check that a checkpoint has the states of the optimizer and of the schedule.

    Raises:
        ValueError: one of the files is missing.
    """
    for name in STATES:
        if not (Path(checkpoint) / name).is_file():
            raise ValueError(f"it has no {name}")


def check_same_start(checkpoint: Path | None, out: Path) -> None:
    """Check that all ranks have found the same checkpoint. Called by every rank.

    Args:
        checkpoint: the checkpoint that this rank has found; None to start from step 0.
        out: the run's folder.

    Raises:
        UserError: two ranks have found different checkpoints; every rank raises it.
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
