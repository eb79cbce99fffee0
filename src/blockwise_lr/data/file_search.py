"""Which files a folder of text holds: links are followed, and what is reached twice is read once."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from blockwise_lr.data.readers import supported
from blockwise_lr.errors import UserError


def files_below(folder: Path) -> Iterator[Path]:
    """The files of a supported format in `folder` and all folders below it, in the order of their paths.

    Links to files and folders are followed. A file or a folder that several paths lead to counts once, under the first
    of these paths, so that a loop of links ends. Hidden files and folders are left out.

    Raises:
        UserError: a link leads to nothing.
        OSError: a folder cannot be listed.
    """
    return _below(folder, set())


def _below(folder: Path, seen: set[str]) -> Iterator[Path]:
    where = os.path.realpath(folder)
    if where in seen:
        return
    seen.add(where)
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not path.exists():
            if supported(path) or not path.suffix:  # a file of text, or perhaps a folder of them
                raise UserError(
                    f"{path} is a link to {path.readlink()}, which is not there: restore it, or remove the link"
                )
        elif path.is_dir():
            yield from _below(path, seen)
        elif supported(path) and path.is_file():
            real = os.path.realpath(path) if entry.is_symlink() else f"{where}/{entry.name}"
            if real not in seen:
                seen.add(real)
                yield path


def files_matching(pattern: str) -> list[Path]:
    """The files that match a glob, in the order of their names; a file that several paths lead to counts once.

    Links are followed. `glob` itself would follow links that lead in a circle for as long as the system lets it.
    """
    found: dict[str, Path] = {}
    for name in sorted({str(Path(match)) for match in _matches(pattern)}):
        if os.path.isfile(name):  # noqa: PTH113 (False where it may not be looked at, as for glob)
            found.setdefault(os.path.realpath(name), Path(name))
    return list(found.values())


def _matches(pattern: str) -> Iterator[str]:
    head, *rest = re.split(r"(?:^|(?<=/))\*\*(?:/+|$)", pattern, maxsplit=1)
    if not rest:
        yield from glob.glob(pattern)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        return
    for base in glob.glob(head) if head else ["."]:  # noqa: PTH207
        for folder in _folders_below(base, set()):
            yield from _matches(f"{glob.escape(folder)}/{rest[0] or '*'}")


def _folders_below(folder: str, seen: set[str]) -> Iterator[str]:
    """The folder and all below it, each once, without those that are hidden or cannot be listed."""
    where = os.path.realpath(folder)
    if where in seen or not os.path.isdir(folder):  # noqa: PTH112
        return
    seen.add(where)
    yield folder
    with contextlib.suppress(PermissionError), os.scandir(folder) as found:
        for name in sorted(entry.name for entry in found if entry.is_dir() and entry.name[0] != "."):
            yield from _folders_below(f"{folder.rstrip('/')}/{name}", seen)
