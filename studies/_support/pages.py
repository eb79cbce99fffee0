"""Write the pages of a study from their templates and the tables that its report script makes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from blockwise_lr.files import write_text_atomic

PAGES = ("README", "details")


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
