"""A process of a run that is gone: how the others notice, and which of them says so."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from blockwise_lr.locks import HeldError, take_lock

# gloo and NCCL have no class of errors for it.
_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error is how a collective says that another process is gone."""
    return dist.is_initialized() and any(sign in str(error) for sign in _SIGNS)


def is_to_say(lock: Path) -> bool:
    """Whether this process is to say what happened to the run: rank 0, or if that is gone, the first to find out.

    Args:
        lock: the file that rank 0 holds while it lives; the system drops the lock of a dead process.
    """
    if os.environ.get("RANK", "0") == "0":
        return True
    try:
        take_lock(lock)  # until this process ends
    except HeldError:
        return False
    return True
