"""sharpness.jsonl: one report a line, written as training goes on, cut back when it resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockwise_lr.files import write_text_atomic
from blockwise_lr.sharpness.report import SharpnessReport


def append_report(path: str | Path, report: SharpnessReport) -> None:
    """Add one line; it is on the disk when this returns.

    A checkpoint that is saved afterwards can so count on it.
    """
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(report.to_dict(), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_reports(path: str | Path, keep: Callable[[SharpnessReport], bool]) -> None:
    """Write `path` again with the lines that `keep` wants, whole or not at all; a half last line goes too.

    Args:
        path: the file; made, empty, where there is none.
        keep: of a report.

    Raises:
        ValueError: as :func:`read_reports`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line, report in _lines(path) if keep(report)] if path.exists() else []
    write_text_atomic(path, "".join(line + "\n" for line in kept))


def read_reports(path: str | Path, *, estimator: str | None = None) -> list[SharpnessReport]:
    """The reports of a sharpness.jsonl in the order in which they were measured, or of a sharpness.json by step.

    Args:
        path: a .jsonl as :class:`blockwise_lr.sharpness.monitor.SharpnessMonitor` writes it, of which a last line
            that a crash cut short is left out; or any other name: what ``SharpnessReport.to_json`` or
            ``blockwise-lr sharpness`` wrote, with the earlier checkpoints first.
        estimator: only the reports of this one. Default: all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line, or the file, holds no report; names it.

    Example:
        >>> from blockwise_lr.sharpness.plot import plot_evolution  # doctest: +SKIP
        >>> plot_evolution(read_reports("run/sharpness.jsonl", estimator="fisher"), "fisher.png")  # doctest: +SKIP
    """
    found = _read(Path(path))
    return [report for report in found if estimator in (None, report.estimator)]


def _read(path: Path) -> list[SharpnessReport]:
    if path.suffix == ".jsonl":
        return [report for _, report in _lines(path)]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        last = SharpnessReport.from_dict(content)
        if not isinstance(earlier := content.get("earlier", []), list):
            raise ValueError(f'its "earlier" is {type(earlier).__name__}; expected a list')
        return [*map(SharpnessReport.from_dict, earlier), last]
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _lines(path: Path) -> list[tuple[str, SharpnessReport]]:
    """Every line and the report in it."""
    # A half character at the end belongs to a half line: nothing to complain about.
    *whole, _unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for number, line in enumerate(whole, 1):
        try:
            content: Any = json.loads(line)
            found.append((line, SharpnessReport.from_dict(content)))
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return found
