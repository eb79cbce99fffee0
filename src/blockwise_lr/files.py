"""Writing files so that a reader finds the old one or the new one, never half of one; and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockwise_lr.errors import StorageError, UserError


def make_folder(path: Path, flag: str = "--out") -> None:
    """Make a folder for results, with those above it.

    Raises:
        UserError: a file of that name, nowhere to write, or a name that is not text; names the flag to change.
    """
    check_name(path, flag)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {path} cannot be made ({error.strerror}): choose another {flag}"
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(
            f"the folder {path} cannot be written by this user: choose another {flag}, or make it writable"
        )


def check_name(path: str | Path, flag: str) -> None:
    """Refuse a path that is not text in the encoding of file names: several libraries take text alone.

    Raises:
        UserError: there are bytes in it that stand for no character; names the flag to change.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{flag} {str(path)!a} is not text in the encoding of file names here, {sys.getfilesystemencoding()}: "
            "give it another name" + ("" if _has_utf8_names() else ", or set PYTHONUTF8=1")
        ) from None


def _has_utf8_names() -> bool:
    return sys.getfilesystemencoding().lower() == "utf-8"


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """While `path` is read: turn what the system has against it into one line.

    Raises:
        UserError: instead of an OSError with a number; names the file that the error names, else `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(
            f"{error.filename or path} cannot be read ({error.strerror}): "
            + ("make it readable for this user" if isinstance(error, PermissionError) else "check the path")
        ) from error


def expanded(path: str) -> Path:
    """The path with ~ replaced by the home folder.

    Raises:
        UserError: this user, or the user that is named, has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} cannot be found ({error}): give the path without ~") from None


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
            # Escapes stand for what is no character, such as bytes of a file's name.
            with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
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
