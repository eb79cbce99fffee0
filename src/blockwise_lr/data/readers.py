"""File formats: the documents in one .txt, .jsonl(.gz/.zst) or .parquet file."""

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
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_LONGEST_WINDOW = 31  # log2 of bytes: the most that the format of zstd has, and `zstd --long=31` writes


def format_of(path: Path) -> str | None:
    """Which of SUFFIXES the name ends with, in capitals or not; None: none.

    Example:
        >>> format_of(Path("A.JSONL.GZ"))
        '.jsonl.gz'
    """
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def supported(path: Path) -> bool:
    """Whether the ending is one of SUFFIXES, in capitals or not."""
    return format_of(path) is not None


def formats() -> str:
    """The endings, for messages."""
    return ", ".join(SUFFIXES[:-1]) + " or " + SUFFIXES[-1]


def read_text(path: Path) -> str:
    """The whole file, without a byte order mark. Raises UserError unless it is UTF-8."""
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
    """`field` of every line's object, decompressed by the file's ending; empty lines are skipped.

    Raises:
        UserError: a line is no JSON object or has no such field; the file is not UTF-8, cut short or corrupt.
    """
    try:
        with (
            reading(path),
            contextlib.closing(_decompressed(path)) as raw,
            io.TextIOWrapper(raw, "utf-8", newline="\n") as file,
        ):
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                # Files put together with `cat` have the marks of all of them.
                line = line.removeprefix(BYTE_ORDER_MARK)
                if line.strip():
                    yield text_of(_json_object(line, where), field, where)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, error.reason) from error


def _decompressed(path: Path) -> IO[bytes]:
    """The file's content as a binary stream; reading it raises UserError where it is cut short or corrupt."""
    kind = format_of(path)
    if kind == ".jsonl" or not path.stat().st_size:
        return path.open("rb")
    return cast(
        "IO[bytes]", io.BufferedReader(_Whole(path, "zstd" if kind == ".jsonl.zst" else "gzip"), 2**20)
    )


class _Whole(io.RawIOBase):
    """A compressed file, of any number of frames one after the other, that must be whole."""

    def __init__(self, path: Path, codec: str) -> None:
        self._path = path
        self._file = _open_zstd(path) if codec == "zstd" else _open_pyarrow(path, codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # zstd's has no base class, pyarrow's is an OSError without a number
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

    # pyarrow, not gzip and zstandard: it is faster, notices a file that is cut short, and reads several frames.
    return pyarrow.input_stream(pyarrow.OSFile(os.fsencode(path)), compression=codec)


def _open_zstd(path: Path) -> Any:
    """With any window. Without Python's own library for zstd, or its backport: by pyarrow, up to windows of 128 MiB."""
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
    """The file as a pyarrow.parquet.ParquetFile. Raises UserError if it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        with reading(path):
            return pyarrow.parquet.ParquetFile(pyarrow.OSFile(os.fsencode(path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file: {error}") from error


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """Column `field`, 256 rows at a time. Raises UserError without such a column."""
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
    """Text of a row, without a byte order mark; none (null) is empty.

    Raises:
        UserError: the row has no such field, or no text in it; the message begins with `where`.
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
    except UnicodeEncodeError:  # half a surrogate pair, legal in JSON, which no tokenizer takes
        text = text.encode("utf-8", "replace").decode()
    return text


def no_field(field: str, fields: Iterable[str], where: str) -> UserError:
    """The error that lists the fields there are."""
    there = ", ".join(fields) or "none"
    return UserError(f"{where}: no field {field!r}; the fields are {there}: choose one with --text-field")
