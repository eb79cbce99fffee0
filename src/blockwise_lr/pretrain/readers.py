"""File formats: the documents in one .txt, .jsonl(.gz/.zst) or .parquet file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from blockwise_lr.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def supported(path: Path) -> bool:
    """Whether the ending is one of SUFFIXES."""
    return path.name.endswith(SUFFIXES)


def formats() -> str:
    """The endings, for messages."""
    return ", ".join(SUFFIXES[:-1]) + " or " + SUFFIXES[-1]


def read_text(path: Path) -> str:
    """The whole file. Raises UserError unless it is UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    """`field` of every line's object, decompressed by the file's ending; empty lines are skipped.

    Raises:
        UserError: a line is no JSON object or has no such field; the file is not UTF-8, cut short or corrupt.
    """
    import pyarrow

    try:
        # pyarrow, not gzip and zstandard: it also notices a .zst that is cut short, and reads several frames.
        with (
            pyarrow.input_stream(str(path), compression="detect") as raw,
            io.TextIOWrapper(raw, "utf-8", newline="\n") as file,
        ):
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if line.strip():
                    yield text_of(_json_object(line, where), field, where)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): convert it first") from error
    except OSError as error:
        raise UserError(f"{path} is cut short or corrupt ({error}): get it again") from error


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
        return pyarrow.parquet.ParquetFile(path)
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
    """Text of a row; none (null) is empty. Raises UserError, beginning with `where`, without such a field."""
    if not isinstance(row, dict) or field not in row:
        raise no_field(field, list(row) if isinstance(row, dict) else [], where)
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} holds {type(text).__name__}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, legal in JSON, which no tokenizer takes
        text = text.encode("utf-8", "replace").decode()
    return text


def no_field(field: str, fields: Iterable[str], where: str) -> UserError:
    """The error that lists the fields there are."""
    there = ", ".join(fields) or "none"
    return UserError(f"{where}: no field {field!r}; the fields are {there}: choose one with --text-field")
