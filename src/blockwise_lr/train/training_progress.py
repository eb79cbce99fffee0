"""Show the progress of a run: a live bar on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

_SECONDS_BETWEEN_LINES = 15.0


class TrainingProgress(TrainerCallback):
    """Shows steps, loss, validation loss, tokens per second and remaining time.

    Args:
        tokens_per_step: tokens in one optimizer step, over all ranks.
        console: where to print; a terminal gets a bar.
    """

    def __init__(self, tokens_per_step: int, console: Console) -> None:
        self._tokens_per_step = tokens_per_step
        self._console = console
        self._bar: Progress | None = None
        self._note: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()  # an interrupted training may have left its bar
        self._start = self._last_line = time.monotonic()
        self._first_step = state.global_step
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=self._console,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(
                "train", total=state.max_steps, completed=state.global_step, note=""
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._note["loss"] = f"loss {logs['loss']:.3f}"
        if "eval_loss" in logs:
            self._note["val"] = f"val {logs['eval_loss']:.3f}"
        elapsed = time.monotonic() - self._start
        rate = (state.global_step - self._first_step) * self._tokens_per_step / max(elapsed, 1e-9)
        note = "  ".join([*self._note.values(), f"{rate:,.0f} tokens/s"])
        if self._bar:
            self._bar.update(self._task, note=note)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES or "eval_loss" in logs:
            self._last_line = time.monotonic()
            left = (
                (state.max_steps - state.global_step) * elapsed / max(state.global_step - self._first_step, 1)
            )
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  {note}  ETA {left:.0f} s", highlight=False
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop the bar. Call this after an error too: it restores the terminal's cursor."""
        if self._bar:
            self._bar.stop()
            self._bar = None
