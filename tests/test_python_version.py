"""The oldest Python: stated in several places, the same in all of them, and what the pinned packages need."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def stated() -> dict[str, set[str]]:
    """Where the oldest Python is stated, and as what."""
    tools = PROJECT["tool"]
    texts = {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in ("README.md", "Makefile", "constraints.txt")
    }
    guard = re.search(r"sys\.version_info < \((\d+), (\d+)\)", texts["Makefile"])
    assert guard is not None
    return {
        "requires-python": {PROJECT["project"]["requires-python"].removeprefix(">=")},
        "ruff": {re.sub(r"py(\d)", r"\1.", tools["ruff"]["target-version"])},
        "mypy": {tools["mypy"]["python_version"]},
        "classifiers": {
            min(c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if ":: Python :: 3." in c)
        },
        "make's own check": {".".join(guard.groups())},
        **{name: set(re.findall(r"Python (3\.\d+)", text)) for name, text in texts.items()},
    }


def test_it_is_the_same_everywhere() -> None:
    assert stated() == {key: {"3.11"} for key in stated()}


def test_no_page_states_another() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        if path.name != "CHANGELOG.md":  # where a release may tell of another
            assert set(re.findall(r"Python (3\.\d+)", path.read_text(encoding="utf-8"))) <= {"3.11"}, path


def test_this_python_is_one_of_them() -> None:
    assert sys.version_info >= tuple(
        map(int, PROJECT["project"]["requires-python"].removeprefix(">=").split("."))
    )
