"""Writing files so that a reader finds the old one or the new one, never half of one; and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockwise_lr.errors import StorageError, UserError


def make_folder(path: Path, flag: str = "--out") -> None:
    """Make a folder for results, with those above it.

    Raises:
        UserError: a file of that name, or nowhere to write; names the flag to change.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {path} cannot be made ({error.strerror}): choose another {flag}"
        ) from None


@contextlib.contextmanager
def storing(path: str | Path) -> Iterator[None]:
    """While `path` is written: what the system has against it becomes one line that names the file.

    Raises:
        StorageError: instead of an OSError, and of what torch and safetensors make of one.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(path, error.strerror or str(error)) from error
    except Exception as error:
        # Neither library has a class of errors for this; both lose the number that the system gave.
        words = f"{type(error).__name__}: {error}"
        if any(
            sign in words for sign in ("inline_container", "PytorchStreamWriter", "I/O error", "iostream")
        ):
            reason = next(iter(str(error).splitlines()), "no reason given")
            raise StorageError(path, f"is the disk full? {reason}") from error
        raise


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` by way of a temporary name beside it and a rename.

    The data reach the disk before the rename, so that a crash cannot leave the new name on an empty file.

    Raises:
        StorageError: it cannot be written; what `path` held before, it still holds.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with storing(path):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused, since it is not JSON."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
