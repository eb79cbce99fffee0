"""metrics.jsonl: one JSON object a logged step, cut back to the checkpoint when a run resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from blockwise_lr.files import write_text_atomic


class MetricsFile:
    """The metrics of one run on disk.

    A row is whole once :meth:`append` returns; a row that a crash cut short is dropped on reading.

    Args:
        path: the metrics.jsonl to write.
        resume_step: keep the rows up to this optimizer step (0: start afresh).
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        rows = [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step else []
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        self.skipped = sum(row.get("skipped", 0) for row in rows)
        write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; a number that is not finite becomes null, since JSON has none."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_with_nulls(row), allow_nan=False) + "\n")


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nulls(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in order; an unfinished last line is left out. No file: no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
