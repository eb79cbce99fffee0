"""Wrong input as data: what is done to a folder of good files, the command line, and what its one line must say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Make = Callable[[], object]
"""Changes the working directory, which holds what the fixture `good` of test_bad_inputs.py puts there."""


@dataclass(frozen=True)
class Bad:
    """One wrong input.

    Args:
        what: a few words, for the name of the test.
        command: the command line behind `blockwise-lr`, as a shell would split it.
        says: pieces that the message must contain: what was wrong, with its value, and what was expected.
        make: what is broken before.
        needs_no_gpu: whether it is only wrong on a machine without one.
    """

    what: str
    command: str
    says: tuple[str, ...]
    make: Make | None = None
    needs_no_gpu: bool = False


def file(name: str, content: str | bytes = "") -> Make:
    """Writes a file, with the folders above it."""

    def make() -> None:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def field(where: str, value: Any, path: str = "tiny.json") -> Make:
    """Replaces one field of a JSON file, such as "optim.base_lr"."""

    def make() -> None:
        content = json.loads(Path(path).read_text())
        inner = content
        *above, name = where.split(".")
        for each in above:
            inner = inner[each]
        inner[name] = value
        Path(path).write_text(json.dumps(content))

    return make


def cut(name: str, keep: float = 0.5) -> Make:
    """Leaves the first part of a file."""

    def make() -> None:
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[: int(keep * len(content))])

    return make


def flip(name: str) -> Make:
    """Changes one bit in the middle of a file."""

    def make() -> None:
        content = bytearray(Path(name).read_bytes())
        content[len(content) // 2] ^= 1
        Path(name).write_bytes(content)

    return make


def remove(*names: str) -> Make:
    """Deletes files and folders."""

    def make() -> None:
        for name in names:
            path = Path(name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def both(*makes: Make) -> Make:
    """One after the other."""
    return lambda: [make() for make in makes]
