"""The cache of tokenizers and token shards: where it is, what an entry is called, and who may write it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.errors import StorageError, UserError
from blockwise_lr.files import check_name, expanded
from blockwise_lr.locks import HeldError, take_lock


def key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(config: DataConfig) -> Path:
    """The cache, made if missing: that of the configuration, $BLOCKWISE_LR_CACHE, or this user's own.

    Raises:
        UserError: it cannot be made, or this user has no home folder.
    """
    given = config.cache or os.environ.get("BLOCKWISE_LR_CACHE")
    path = expanded(given) if given else _of_this_user()
    check_name(path, "the cache folder")
    try:
        (path / "tokens").mkdir(parents=True, exist_ok=True)
        (path / "tokenizers").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache folder {path} cannot be made ({error.strerror}): {_ANOTHER}") from error
    return path


_ANOTHER = "choose another with $BLOCKWISE_LR_CACHE"


def _of_this_user() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():  # others are to be ignored, by the specification
        return Path(base) / "blockwise-lr"
    try:
        return Path("~/.cache/blockwise-lr").expanduser()
    except RuntimeError:
        raise UserError(
            "there is no home folder for the cache of tokens: name a folder with $BLOCKWISE_LR_CACHE"
        ) from None


@contextmanager
def using(cache: Path) -> Iterator[None]:
    """While the cache is used: what its owner does not allow this user becomes one line.

    Raises:
        UserError: instead of an OSError or StorageError about permissions.
    """
    try:
        yield
    except (OSError, StorageError) as error:
        denied = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(denied, OSError) or denied.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(
            f"the cache folder {cache} cannot be used by this user ({denied.filename or cache}: {denied.strerror}): "
            f"{_ANOTHER}"
        ) from error


@contextmanager
def only_one(folder: Path, progress: bool) -> Iterator[None]:
    """Hold the folder's lock, and wait for it where another process holds it."""
    path = folder.with_name(f"{folder.name}.lock")
    try:
        lock = take_lock(path)
    except HeldError as held:
        if progress:
            from rich.console import Console

            Console(stderr=True).print(
                f"waiting for another process that prepares {folder.name}{held.advice}", markup=False
            )
        lock = take_lock(path, wait=True)
    try:
        yield
    finally:
        lock.release()
