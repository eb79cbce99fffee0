"""Print what a report answers, for the commands whose report is a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_answer(content: Mapping[str, Any], out: Path, console: Console | None = None) -> None:
    """Print the answer, the warnings and the path of the report.

    Args:
        content: the content of the report, with "answer" and "warnings".
        out: the folder of report.html.
        console: where to print. Default: standard output.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    for sentence in content["answer"]:
        console.print(Text(sentence, style="bold"))
    for warning in content["warnings"]:
        console.print(Text(f"Note: {warning}"))
    console.print(Text(f"Report: {out / 'report.html'}"), soft_wrap=True)
