"""Show the progress of work on documents, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def documents_bar(
    label: str, total: int | None, done: int = 0, *, enabled: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar over documents, with megabytes per second.

    Args:
        label: the name of the work.
        total: number of documents; None if it is unknown.
        done: number of documents that an earlier run has finished.
        enabled: False shows no bar.

    Yields:
        The function ``advance(documents, characters)``, to call after each part of the work.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("documents, {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(label, total=total, completed=done, rate="")
        text = 0

        def advance(documents: int, characters: int) -> None:
            nonlocal text
            text += characters
            elapsed = bar.tasks[0].elapsed or 1e-9
            bar.update(task, advance=documents, rate=f"{text / 1e6:.0f} MB, {text / 1e6 / elapsed:.1f} MB/s")

        yield advance
