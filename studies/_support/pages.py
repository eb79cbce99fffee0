"""Write the pages of a study from their templates and the tables that its report script makes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from blockwise_lr.files import write_text_atomic

PAGES = ("README", "details")


def filled(tables: Mapping[str, str]) -> dict[str, str]:
    """Return the tables, with "None yet." in place of each that has no rows."""
    return {name: text if text.count("\n") > 1 else "None yet." for name, text in tables.items()}


def wrapped(text: str) -> str:
    """Return a paragraph in lines of at most 100 characters, as the pages have them."""
    return textwrap.fill(text, 100, break_on_hyphens=False)


def bullets(lines: Iterable[str]) -> str:
    """Return sentences as a list in Markdown; "None." if there are none."""
    return "\n".join(f"- {line}" for line in lines) or "- None."


def image(text: str, file: str, there: bool) -> str:
    """Return an image in Markdown, or nothing: a page names no figure that could not be drawn."""
    return f"![{text}]({file})" if there else ""


def write_pages(study: Path, tables: Mapping[str, str], pages: Sequence[str] = PAGES) -> None:
    """Write the pages of `study`, such as README.md, from templates beside them, such as README.template.md.

    Each ``{{name}}`` in a template is replaced by the table of that name. The templates hold the text that is written
    by hand; edit them, not the pages.

    Raises:
        KeyError: a template names a table that is not in `tables`.
    """
    for page in pages:
        template = (study / f"{page}.template.md").read_text(encoding="utf-8")
        text = re.sub(r"\{\{(\w+)\}\}", lambda found: tables[found[1]], template)
        write_text_atomic(study / f"{page}.md", text)
