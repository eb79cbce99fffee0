"""Detect that a process of a distributed run has exited, and choose the process that reports it."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

# gloo and NCCL raise a plain RuntimeError, so only the message identifies a lost connection.
_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_REPORTED = ".lost"  # in a run's folder


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective raised the error because another process has exited."""
    return dist.is_initialized() and any(sign in str(error) for sign in _SIGNS)


def is_first_to_report(out: Path) -> bool:
    """Return True in the first process of a run that calls this, and False in all later ones.

    The first process creates a file in the run's folder. Rank 0's lock on that folder cannot decide: the system may
    close the connections of a killed process before it drops its lock.

    Args:
        out: the folder of the run.
    """
    try:
        (out / _REPORTED).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # two reports on a full disk are better than none
        pass
    return True


def forget_report(out: Path) -> None:
    """Remove the file that an earlier attempt of this run left, so that this attempt can report."""
    (out / _REPORTED).unlink(missing_ok=True)
