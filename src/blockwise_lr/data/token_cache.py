"""The cache of tokenizers and token shards: its folder, the keys of its entries, and their locks."""

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


def cache_key(*parts: Any) -> str:
    """Return the key of a cache entry: a hash of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(config: DataConfig) -> Path:
    """Return the cache folder, and create it if it is missing.

    The folder is that of the configuration, otherwise $BLOCKWISE_LR_CACHE, otherwise this user's own.

    Raises:
        UserError: the folder cannot be created, or this user has no home folder.
    """
    given = config.cache or os.environ.get("BLOCKWISE_LR_CACHE")
    path = expanded(given) if given else _user_cache()
    check_name(path, "the cache folder")
    try:
        (path / "tokens").mkdir(parents=True, exist_ok=True)
        (path / "tokenizers").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {path} cannot be made ({error.strerror}): {_choose_another(config)}"
        ) from error
    return path


def _choose_another(config: DataConfig) -> str:
    """Return how to choose another cache folder. The configuration's own folder takes precedence over the variable."""
    if config.cache:
        return "choose another with --cache (for a run that is there: as data.cache in its config.json)"
    return "choose another with $BLOCKWISE_LR_CACHE"


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():  # the XDG specification ignores relative paths
        return Path(base) / "blockwise-lr"
    try:
        return Path("~/.cache/blockwise-lr").expanduser()
    except RuntimeError:
        raise UserError(
            "there is no home folder for the cache of tokens: name a folder with $BLOCKWISE_LR_CACHE"
        ) from None


@contextmanager
def reporting_denied_access(cache: Path, config: DataConfig) -> Iterator[None]:
    """Turn permission errors in a block that uses the cache into one-line messages.

    Args:
        cache: the result of :func:`cache_folder`.
        config: the configuration that names the cache folder, if it does.

    Raises:
        UserError: replaces an OSError or StorageError about permissions.
    """
    try:
        yield
    except (OSError, StorageError) as error:
        denied = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(denied, OSError) or denied.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(
            f"the cache folder {cache} cannot be used by this user ({denied.filename or cache}: {denied.strerror}): "
            f"{_choose_another(config)}"
        ) from error


@contextmanager
def hold_lock(folder: Path, progress: bool) -> Iterator[None]:
    """Hold the lock of a cache entry's folder during the block, after waiting for other processes.

    Args:
        folder: the folder to build.
        progress: print a line on stderr when waiting.
    """
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
