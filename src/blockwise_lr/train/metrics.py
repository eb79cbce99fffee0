"""metrics.jsonl: one JSON object for each logged step, truncated to the checkpoint when a run resumes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from blockwise_lr.errors import UserError
from blockwise_lr.files import storing, write_text_atomic
from blockwise_lr.train.spikes import WINDOW, is_spike


class MetricsFile:
    """The metrics.jsonl of one run, opened for appending.

    A row is complete once :meth:`append` returns. Reading drops a row that a crash cut short.

    Args:
        path: the metrics.jsonl to write.
        resume_step: the optimizer step to resume at. Rows of later steps are removed; 0 removes all rows.

    Raises:
        UserError: the existing rows are damaged.
        StorageError: the file cannot be written.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        rows = [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step else []
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        self.skipped = sum(row.get("skipped", 0) for row in rows)
        self._losses = [row.get("train_loss") for row in rows][-WINDOW:]
        write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: dict[str, Any]) -> None:
        """Append one row. NaN and infinity become null, because JSON has neither.

        A row whose loss is far above the previous losses gets ``"spike": true``
        (:func:`blockwise_lr.train.spikes.is_spike`).
        """
        row = _with_nulls(row)
        if is_spike(row["train_loss"], self._losses):
            row["spike"] = True
        self._losses = [*self._losses, row["train_loss"]][-WINDOW:]
        with storing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Flush the rows to disk. Call this before sealing a checkpoint, which resumes with these rows."""
        with storing(self._path), self._path.open("rb+") as file:
            os.fsync(file.fileno())


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nulls(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl in order; an empty list if the file does not exist.

    A damaged line at the end of the file, which a crash can leave, is dropped.

    Raises:
        UserError: a damaged line has complete rows after it, which a crash cannot cause.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    damaged = 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        row = _row(line)
        if row is None:
            damaged = damaged or number
        elif damaged:
            raise UserError(
                f"{path}, line {damaged} is damaged, and whole ones follow: restore the file, or remove it to go on "
                "without the rows so far"
            )
        else:
            rows.append(row)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
        if isinstance(row["step"], int) and isinstance(row["seconds"], int | float):
            return dict(row)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
