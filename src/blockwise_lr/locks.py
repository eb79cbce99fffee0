"""Locks between processes, also on file systems without them."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

# What file systems without locks answer: Lustre without `-o flock`, NFS without a lock daemon, some FUSE and 9p.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}


class HeldError(Exception):
    """Another process holds the lock.

    Attributes:
        advice: what to do about a marker that a process of another machine may have left; empty where the system
            drops the lock of a process that has died.
    """

    def __init__(self, marker: Path | None) -> None:
        super().__init__("another process holds the lock")
        self.advice = f" (if there is none on any machine, remove {marker})" if marker else ""


def take_lock(path: Path, *, wait: bool = False) -> BaseFileLock:
    """Take the lock `path`, which is dropped when this process ends, however it ends.

    Where the file system has no locks, the existence of a file is the lock. It names its process, so that another one
    of the same machine sees when that process has died.

    Args:
        path: the file of the lock.
        wait: wait for another process that holds it.

    Raises:
        HeldError: another process holds it, and `wait` is False.
        OSError: the file cannot be made.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    lock: BaseFileLock = FileLock(path)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="flock not supported"
        )  # newer versions change to a marker themselves
        try:
            lock.acquire(blocking=wait)
            return lock
        except Timeout:
            raise HeldError(path if isinstance(lock, SoftFileLock) else None) from None
        except NotImplementedError:  # older versions
            pass
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    marker = path.with_name(f"{path.name}.held")
    lock = SoftFileLock(marker)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise HeldError(marker) from None
    return lock
