"""Which files a folder of text holds: links are followed, and what is reached twice is read once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from blockwise_lr.errors import UserError
from blockwise_lr.pretrain.readers import supported


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
        if entry.is_dir():
            yield from _below(path, seen)
        elif supported(path):
            if entry.is_symlink() and not path.exists():
                raise UserError(
                    f"{path} is a link to {path.readlink()}, which is not there: restore the file, or remove the link"
                )
            real = os.path.realpath(path) if entry.is_symlink() else f"{where}/{entry.name}"
            if entry.is_file() and real not in seen:
                seen.add(real)
                yield path


def each_once(paths: Iterable[Path]) -> list[Path]:
    """The paths without those that lead to the same file as an earlier one."""
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())
