"""File locks between processes, including on file systems without lock support."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

# The errors of file systems without locks: Lustre without `-o flock`, NFS without a lock daemon, some FUSE and 9p.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}


class HeldError(Exception):
    """Another process holds the lock.

    Attributes:
        advice: how to remove the marker file of a process that has died on another machine; empty if the system itself
            releases the locks of dead processes.
    """

    def __init__(self, marker: Path | None) -> None:
        super().__init__("another process holds the lock")
        self.advice = f" (if there is none on any machine, remove {marker})" if marker else ""


def take_lock(path: Path, *, wait: bool = False) -> BaseFileLock:
    """Take the lock `path`. The system releases it when this process ends, even if it is killed.

    On a file system without locks, a marker file is the lock. The file names its process, so that other processes on
    the same machine notice when that process has died.

    Args:
        path: the lock file.
        wait: wait until no other process holds the lock.

    Returns:
        The lock; its ``release()`` releases it.

    Raises:
        HeldError: another process holds the lock, and `wait` is False.
        OSError: the file cannot be created.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    lock: BaseFileLock = FileLock(path)
    with warnings.catch_warnings():
        # Newer versions of filelock switch to a marker file by themselves, with this warning.
        warnings.filterwarnings("ignore", message="flock not supported")
        try:
            lock.acquire(blocking=wait)
            return lock
        except Timeout:
            raise HeldError(path if isinstance(lock, SoftFileLock) else None) from None
        except NotImplementedError:  # older versions of filelock raise it instead of switching
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
