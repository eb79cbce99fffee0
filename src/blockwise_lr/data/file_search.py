"""Find the text files in a folder or of a glob. Links are followed, and each file is found once."""

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
    """Yield the files of a supported format in `folder` and all its subfolders, in the order of their paths.

    Links are followed. A file or folder that several paths lead to is yielded once, under the first path, so a loop of
    links ends. Hidden files and folders are skipped.

    Raises:
        UserError: the target of a link does not exist.
        OSError: a folder cannot be listed.
    """
    return _walk(folder, set())


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
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
        if entry.is_symlink():
            _check_target(path)
        if path.is_dir():
            yield from _walk(path, seen)
        elif supported(path) and path.is_file():
            real = os.path.realpath(path) if entry.is_symlink() else f"{where}/{entry.name}"
            if real not in seen:
                seen.add(real)
                yield path


def _check_target(link: Path) -> None:
    """Raise UserError if a link that may be meant for a text file or a folder leads to nothing."""
    if (supported(link) or not link.suffix) and not link.exists():
        raise UserError(
            f"{link} is a link to {link.readlink()}, which is not there: restore it, or remove the link"
        )


def files_matching(pattern: str) -> list[Path]:
    """Return the files that match a glob, in the order of their names.

    Links are followed, and a file that several paths lead to is returned once. Python's `glob` would follow a loop of
    links until the system refuses.

    Raises:
        UserError: the target of a link does not exist.
    """
    found: dict[str, Path] = {}
    for name in sorted({str(Path(match)) for match in _matches(pattern)}):
        if os.path.islink(name):  # noqa: PTH114
            _check_target(Path(name))
        if os.path.isfile(name):  # noqa: PTH113 (like glob, it returns False where access is denied)
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
    """Yield a folder and all its subfolders once each, without hidden ones and those that cannot be listed."""
    where = os.path.realpath(folder)
    if where in seen or not os.path.isdir(folder):  # noqa: PTH112
        return
    seen.add(where)
    yield folder
    entries: list[os.DirEntry[str]] = []
    with contextlib.suppress(PermissionError), os.scandir(folder) as found:
        entries = sorted((each for each in found if each.name[0] != "."), key=lambda each: each.name)
    for entry in entries:
        if entry.is_symlink() and not Path(entry.name).suffix:  # it may be meant for a folder
            _check_target(Path(entry.path))
        if entry.is_symlink() or entry.is_dir():
            yield from _folders_below(f"{folder.rstrip('/')}/{entry.name}", seen)
