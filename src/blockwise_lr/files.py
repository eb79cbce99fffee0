"""Write files atomically, compute checksums, and turn errors of the file system into one-line messages."""

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
    """Create a folder for results, with its parent folders.

    Args:
        path: the folder; it may exist.
        flag: the flag that sets the folder, for messages.

    Raises:
        UserError: the folder cannot be created or written, or its name is not text; the message names `flag`.
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
    """Check that a path is text in the encoding of file names: several libraries accept only text.

    Args:
        path: the path to check.
        flag: the flag that sets the path, for messages.

    Raises:
        UserError: the path has bytes that stand for no character; the message names `flag`.
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
    """Turn the system's errors in a block that reads `path` into one-line messages.

    Raises:
        UserError: replaces an OSError that has a number; names the error's own file, or `path` if it has none.
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
    """Return a path with ~ replaced by the home folder.

    Raises:
        UserError: the user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} cannot be found ({error}): give the path without ~") from None


@contextlib.contextmanager
def storing(path: str | Path) -> Iterator[None]:
    """Turn the system's errors in a block that writes `path` into one-line messages that name the file.

    Raises:
        StorageError: replaces an OSError, or the error that torch or safetensors raises for one.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(path, error.strerror or str(error)) from error
    except Exception as error:
        # torch and safetensors have no own class for this, and their errors lack the system's error number.
        words = f"{type(error).__name__}: {error}"
        if any(
            sign in words for sign in ("inline_container", "PytorchStreamWriter", "I/O error", "iostream")
        ):
            reason = next(iter(str(error).splitlines()), "no reason given")
            raise StorageError(path, f"is the disk full? {reason}") from error
        raise


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically: to a temporary file in the same folder, which is then renamed.

    A reader sees the old content or the new, never a part. The data are flushed to disk before the rename, so a crash
    cannot leave an empty file.

    Raises:
        StorageError: the file cannot be written; its previous content is intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with storing(path):
            # Escapes replace invalid characters, such as undecodable bytes in a file name.
            with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        remove_temporary(temporary)


def remove_temporary(path: Path) -> None:
    """Delete a temporary file if it exists. An error is ignored: it would hide why the file could not be written."""
    with contextlib.suppress(OSError):
        path.unlink()


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically.

    Raises:
        ValueError: `value` contains NaN or infinity, which JSON does not have.
        StorageError: as :func:`write_text_atomic`.
    """
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading it in blocks."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
