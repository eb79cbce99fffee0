"""sharpness.jsonl: one report per line, appended during training and truncated on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockwise_lr.files import write_text_atomic
from blockwise_lr.sharpness.report import SharpnessReport


def append_report(path: str | Path, report: SharpnessReport) -> None:
    """Append one line, and return when it is on disk.

    A checkpoint saved afterwards can therefore rely on it.

    Args:
        path: the file; created if it does not exist.
        report: the report to write.
    """
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(report.to_dict(), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_reports(path: str | Path, keep: Callable[[SharpnessReport], bool]) -> None:
    """Rewrite a file with only the reports that `keep` selects. An unfinished last line is dropped.

    The file is replaced as a whole, or left as it was. It is created empty if it does not exist.

    Args:
        path: the file.
        keep: takes a report and returns whether to keep it.

    Raises:
        ValueError: as :func:`read_reports`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line, report in _lines(path) if keep(report)] if path.exists() else []
    write_text_atomic(path, "".join(line + "\n" for line in kept))


def read_reports(path: str | Path, *, estimator: str | None = None) -> list[SharpnessReport]:
    """Read the reports of a sharpness.jsonl in the order of measurement, or those of a sharpness.json by step.

    Args:
        path: a .jsonl that :class:`blockwise_lr.sharpness.monitor.SharpnessMonitor` wrote; a last line that a crash cut
            short is ignored. A file with another ending is one that ``SharpnessReport.to_json`` or
            ``blockwise-lr sharpness`` wrote; its earlier checkpoints come first.
        estimator: read only the reports of this estimator. Default: all.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line, or the file, is not a report. The message names the line or the file.

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
    """Return every complete line with its report."""
    # An incomplete character can only be in an unfinished last line, which is ignored.
    *whole, _unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for number, line in enumerate(whole, 1):
        try:
            content: Any = json.loads(line)
            found.append((line, SharpnessReport.from_dict(content)))
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return found
