"""Progress display of a comparison: live bars on a terminal, and one line per event elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from blockwise_lr.compare.plan import Run
from blockwise_lr.compare.results import RunResult


class ComparisonProgress:
    """A context manager that reports runs as they start and finish.

    Args:
        enabled: whether to print anything at all.
        console: where to print. Default: standard output. Bars are drawn only on a terminal.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout, quiet=not enabled)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._total: TaskID | None = None

    def __enter__(self) -> ComparisonProgress:
        if self._console.is_terminal and not self._console.quiet:
            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=self._console,
            )  # fmt: skip
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def phase(self, name: str, runs: int, finished: int) -> None:
        """Report the start of a set of runs, some of which an earlier call may have finished."""
        if runs == 0:
            return
        before = f", {finished} of them already finished" if finished else ""
        self.print_line(f"{name}: {runs} runs{before}")
        if self._bars is not None:
            if self._total is not None:
                self._bars.remove_task(self._total)
            self._total = self._bars.add_task(escape(name), total=runs, completed=finished, note="")

    def started(self, run: Run) -> None:
        """Report that a run's process has been started."""
        if self._bars is None:
            self.print_line(f"started   {describe(run)}")
        else:
            self._tasks[run.folder] = self._bars.add_task(
                f"  {escape(describe(run))}", total=run.config.steps, note=""
            )

    def finished(self, run: Run, result: RunResult) -> None:
        """Report that a run has finished."""
        self.print_line(f"finished  {describe(run)}: {describe_result(result)}")
        if self._bars is not None:
            self._bars.remove_task(self._tasks.pop(run.folder))
            if self._total is not None:
                self._bars.advance(self._total)

    def poll(self, active: Iterable[tuple[Run, Path]]) -> None:
        """Update the bars of the active runs from their metrics.jsonl."""
        if self._bars is None:
            return
        for run, folder in active:
            line = last_metrics(folder / "metrics.jsonl")
            if line is not None and run.folder in self._tasks:
                loss = line.get("train_loss")
                note = f"loss {loss:.3f}" if isinstance(loss, (int, float)) else ""
                self._bars.update(self._tasks[run.folder], completed=line.get("step", 0), note=note)

    def print_line(self, text: str) -> None:
        """Print one line without wrapping it or interpreting markup."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(run: Run) -> str:
    """Describe a run: "adamw:uniform 2N, base LR 0.002, seed 0, 800 steps"."""
    return f"{run.series.name}, {run.setting}, seed {run.config.seed}, {run.config.steps} steps"


def describe_result(result: RunResult) -> str:
    """Describe the result of a finished run: its losses and its duration."""
    if result.diverged:
        return f"diverged at step {result.result.get('diverged_at_step', '?')}"
    seconds = result.result.get("seconds")
    time = "" if seconds is None else f" in {format_seconds(seconds)}"
    return f"val loss {result.val_loss:.4f}, tune loss {result.tune_loss:.4f}{time}"


def format_seconds(seconds: float) -> str:
    """Format a duration: "42 s", "3 min 05 s", "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def last_metrics(path: Path, tail: int = 8192) -> dict[str, Any] | None:
    """Return the last complete entry of a metrics.jsonl, which a run may be writing; None if there is none yet.

    Args:
        path: the file.
        tail: number of bytes to read from its end.
    """
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - tail))
            lines = file.read().split(b"\n")
        return next((json.loads(line) for line in reversed(lines[:-1]) if line.strip()), None)
    except (OSError, ValueError):
        return None
