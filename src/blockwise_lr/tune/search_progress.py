"""Progress display of a search: live bars on a terminal, and one line per trial elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from blockwise_lr.compare.comparison_progress import format_seconds, last_metrics
from blockwise_lr.optim.ratios import spell_ratios
from blockwise_lr.tune.trial_store import TrialRecord

PHASES = {
    "uniform": "tuning one learning rate for all blocks",
    "ratios": "searching the ratios",
    "repeat": "repeating the best with other seeds",
}


class SearchProgress:
    """A context manager that reports trials as they start and end.

    Args:
        console: where to print. Default: standard output. Bars are drawn only on a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout)
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._total: TaskID | None = None
        self._ended = self._runs = 0
        self._best: float | None = None

    def __enter__(self) -> SearchProgress:
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

    def phase(self, name: str, runs: int, ended: int) -> None:
        """Report the start of a phase, some of whose runs an earlier call may have ended."""
        before = f", {ended} of them already done" if ended else ""
        self.print_line(f"{PHASES[name]}: {runs} run{'' if runs == 1 else 's'}{before}")
        self._started, self._ended, self._runs = time.monotonic(), 0, runs - ended
        if self._bars is not None:
            if self._total is not None:
                self._bars.remove_task(self._total)
            self._total = self._bars.add_task(escape(PHASES[name]), total=runs, completed=ended, note="")

    def started(self, record: TrialRecord, steps: int) -> None:
        """Report that a trial has been given to a worker."""
        if self._bars is not None:
            text = f"  trial {record.number}: {describe_point(record)}"
            self._tasks[record.number] = self._bars.add_task(escape(text), total=steps, note="")

    def finished(self, record: TrialRecord) -> None:
        """Report that a trial has ended, the best loss so far, and the time that its phase still takes."""
        self._ended += 1
        if record.tune_loss is not None and record.phase != "repeat":
            self._best = min(record.tune_loss, self._best or record.tune_loss)
        elapsed = time.monotonic() - self._started
        left = format_seconds(elapsed / self._ended * (self._runs - self._ended))
        best = "" if self._best is None else f"best {self._best:.4f}; "
        self.print_line(
            f"trial {record.number:>3}  {describe_end(record)}  {describe_point(record)}  "
            f"({best}about {left} left in this phase)"
        )
        if self._bars is not None:
            if record.number in self._tasks:
                self._bars.remove_task(self._tasks.pop(record.number))
            if self._total is not None:
                self._bars.update(self._total, advance=1, note=f"{best}ETA {left}")

    def poll(self, numbers: list[int], runs: Path) -> None:
        """Update the bars of the running trials from their metrics.jsonl."""
        if self._bars is None:
            return
        for number in numbers:
            line = last_metrics(runs / f"{number:04d}" / "metrics.jsonl")
            if line is not None and number in self._tasks:
                loss = line.get("train_loss")
                note = f"loss {loss:.3f}" if isinstance(loss, int | float) else ""
                self._bars.update(self._tasks[number], completed=line.get("step", 0), note=note)

    def print_line(self, text: str) -> None:
        """Print one line without wrapping it or interpreting markup."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe_point(record: TrialRecord) -> str:
    """Describe a trial's point: "base LR 0.002, warm-up 15 %, emb=4,vo=0.7, seed 0"."""
    ratios = {block: float(f"{ratio:.3g}") for block, ratio in record.point.ratios.items()}
    return (
        f"base LR {record.point.base_lr:.3g}, warm-up {record.point.warmup:.0%}, "
        f"{spell_ratios(ratios)}, seed {record.seed}"
    )


def describe_end(record: TrialRecord) -> str:
    """Describe how a trial ended: "tune loss 4.5123", "ended at step 150" or "diverged at step 12"."""
    if record.tune_loss is not None:
        return f"tune loss {record.tune_loss:.4f}"
    return f"{record.status} at step {record.step}"
