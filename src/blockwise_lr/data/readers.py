"""Read the documents of one .txt, .jsonl(.gz/.zst) or .parquet file."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import json
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from blockwise_lr.errors import UserError
from blockwise_lr.files import reading

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
BYTE_ORDER_MARK = "\ufeff"
# UTF-32 comes first, because its little-endian mark begins with UTF-16's.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_LONGEST_WINDOW = 31  # log2 of bytes: the largest window of the zstd format, which `zstd --long=31` writes


def format_of(path: Path) -> str | None:
    """Return the one of SUFFIXES that the name ends with, ignoring case; None if there is none.

    Example:
        >>> format_of(Path("A.JSONL.GZ"))
        '.jsonl.gz'
    """
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def supported(path: Path) -> bool:
    """Return whether the name ends with one of SUFFIXES, ignoring case."""
    return format_of(path) is not None


def formats() -> str:
    """Return the supported suffixes as text for messages."""
    return ", ".join(SUFFIXES[:-1]) + " or " + SUFFIXES[-1]


def read_text(path: Path) -> str:
    """Return the text of a file, without a byte order mark.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        with reading(path):
            return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, f"byte {error.start}") from error


def _not_utf8(path: Path, error: UnicodeDecodeError, where: str) -> UserError:
    for mark, name in _OTHER_MARKS.items():
        if error.object.startswith(mark):
            return UserError(
                f"{path} is {name} text, by its byte order mark; expected UTF-8: convert it, for a plain file with "
                f"iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > NEW-FILE"
            )
    return UserError(f"{path} is not UTF-8 text ({where}): convert it first")


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    """Yield the text in `field` of every line's JSON object. Empty lines are skipped.

    The file's suffix decides whether it is decompressed.

    Raises:
        UserError: a line is no JSON object or lacks the field, or the file is not UTF-8, truncated or corrupt.
    """
    try:
        with (
            reading(path),
            contextlib.closing(_decompressed(path)) as raw,
            io.TextIOWrapper(raw, "utf-8", newline="\n") as file,
        ):
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                # Concatenated files have a byte order mark at the start of each part.
                line = line.removeprefix(BYTE_ORDER_MARK)
                if line.strip():
                    yield text_of(_json_object(line, where), field, where)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, error.reason) from error


def _decompressed(path: Path) -> IO[bytes]:
    """Open a file as a decompressed binary stream, whose reads raise UserError if the file is truncated or corrupt."""
    kind = format_of(path)
    if kind == ".jsonl" or not path.stat().st_size:
        return path.open("rb")
    return cast(
        "IO[bytes]",
        io.BufferedReader(_CompressedFile(path, "zstd" if kind == ".jsonl.zst" else "gzip"), 2**20),
    )


class _CompressedFile(io.RawIOBase):
    """A compressed file with any number of consecutive frames. Reading a truncated or corrupt file raises UserError."""

    def __init__(self, path: Path, codec: str) -> None:
        self._path = path
        self._file = _open_zstd(path) if codec == "zstd" else _open_pyarrow(path, codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except (
            Exception
        ) as error:  # zstd's errors share no base class; pyarrow's is an OSError without a number
            if isinstance(error, OSError) and error.errno is not None:
                raise
            if "too much memory" in str(error):
                raise UserError(
                    f"{self._path} was compressed with a window above 128 MiB (zstd --long), which is read with "
                    "the package backports.zstd: pip install backports.zstd, or compress it again: "
                    f"zstd -d --long=31 -c {shlex.quote(str(self._path))} | zstd -o NEW-FILE"
                ) from error
            raise UserError(f"{self._path} is cut short or corrupt ({error}): get it again") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open_pyarrow(path: Path, codec: str) -> Any:
    import pyarrow

    # pyarrow is faster than gzip and zstandard, detects truncated files, and reads several frames.
    return pyarrow.input_stream(pyarrow.OSFile(os.fsencode(path)), compression=codec)


def _open_zstd(path: Path) -> Any:
    """Open a zstd file with Python's own library or its backport, which read windows of any size.

    Without them, use pyarrow, which reads windows up to 128 MiB.
    """
    for name in ("compression.zstd", "backports.zstd"):
        try:
            zstd = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        return zstd.ZstdFile(path, options={zstd.DecompressionParameter.window_log_max: _LONGEST_WINDOW})
    return _open_pyarrow(path, "zstd")


def _json_object(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); expected one object a line") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: holds {type(value).__name__}; expected one object a line")
    return value


def open_parquet(path: Path) -> Any:
    """Open a file as a pyarrow.parquet.ParquetFile.

    Raises:
        UserError: the file cannot be read, or is not a parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with reading(path):
            return pyarrow.parquet.ParquetFile(pyarrow.OSFile(os.fsencode(path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file: {error}") from error


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """Yield the text in column `field` of every row, reading 256 rows at a time.

    Raises:
        UserError: there is no such column, or the file is corrupt.
    """
    with open_parquet(path) as file:
        if field not in file.schema_arrow.names:
            raise no_field(field, file.schema_arrow.names, str(path))
        batches = file.iter_batches(batch_size=256, columns=[field])
        while rows := _next_rows(batches, path):
            for row in rows:
                yield text_of(row, field, str(path))


def _next_rows(batches: Iterator[Any], path: Path) -> list[Any]:
    import pyarrow

    try:
        return next((batch.to_pylist() for batch in batches if batch.num_rows), [])
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is corrupt ({error}): get it again") from error


def text_of(row: Any, field: str, where: str) -> str:
    """Return the text in `field` of a row, without a byte order mark. Null counts as empty text.

    Raises:
        UserError: the row lacks the field, or the field holds no text; the message begins with `where`.
    """
    if not isinstance(row, dict) or field not in row:
        raise no_field(field, list(row) if isinstance(row, dict) else [], where)
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} holds {type(text).__name__}, expected text")
    text = text.removeprefix(BYTE_ORDER_MARK)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON allows and tokenizers reject
        text = text.encode("utf-8", "replace").decode()
    return text


def no_field(field: str, fields: Iterable[str], where: str) -> UserError:
    """Return the error for a missing field, with the list of existing fields."""
    there = ", ".join(fields) or "none"
    return UserError(f"{where}: no field {field!r}; the fields are {there}: choose one with --text-field")
