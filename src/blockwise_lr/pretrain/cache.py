"""The cache of tokenizers and token shards: where it is, what an entry is called, and who may write it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockwise_lr.errors import UserError
from blockwise_lr.pretrain.config import DataConfig


def key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(config: DataConfig) -> Path:
    folder = config.cache or os.environ.get("BLOCKWISE_LR_CACHE") or "~/.cache/blockwise-lr"
    path = Path(folder).expanduser()
    try:
        (path / "tokens").mkdir(parents=True, exist_ok=True)
        (path / "tokenizers").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {path} cannot be made ({error.strerror}): "
            "choose another with $BLOCKWISE_LR_CACHE"
        ) from error
    return path


@contextmanager
def only_one(folder: Path, progress: bool) -> Iterator[None]:
    """Hold the folder's lock. The system drops it when its holder dies, however it dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if progress:
            from rich.console import Console

            Console(stderr=True).print(f"waiting for another process that prepares {folder.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
