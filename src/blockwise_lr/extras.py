"""Errors for missing packages: what needs the package, and the command that installs it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable
from importlib import metadata

MINIMUM = {"transformers": "5.3"}
"""Lower bounds of pyproject.toml that :func:`check` tests too, because older versions fail only at the first step."""

_REPOSITORY = ("repository", "source", "source code")


def install(extra: str) -> str:
    """Return the command that installs an extra of this package, ready to be typed.

    No package index has blockwise-lr. The command names the repository that the package's metadata gives
    (``[project.urls]``). Without one, it assumes a clone of the repository.

    Args:
        extra: a name from ``[project.optional-dependencies]``, such as "train".

    Example:
        >>> "[plot]" in install("plot")
        True
    """
    address = _repository()
    if address:
        return f"pip install 'blockwise-lr[{extra}] @ git+{address}'"
    return f"pip install '.[{extra}]' in a clone of blockwise-lr"


def missing(purpose: str, package: str, extra: str) -> ModuleNotFoundError:
    """Return the error for a package that is not installed.

    Args:
        purpose: what needs the package, with a verb, such as "figures need".
        package: the package's name.
        extra: the extra of blockwise-lr that installs it.

    Returns:
        The error to raise; its message is one line.

    Example:
        >>> str(missing("figures need", "matplotlib", "plot")).partition(": ")[0]
        'figures need matplotlib, which is not installed'
    """
    return ModuleNotFoundError(f"{purpose} {package}, which is not installed: {install(extra)}", name=package)


def explained(error: ModuleNotFoundError, purpose: str, extra: str = "train") -> ModuleNotFoundError:
    """Return the error to raise instead of an import's own, which only says that a module is missing.

    Args:
        error: the error that the import raised.
        purpose: what needs the package, with a verb.
        extra: the extra of blockwise-lr that installs it.

    Example:
        >>> try:
        ...     import no_such_package
        ... except ModuleNotFoundError as error:
        ...     print(str(explained(error, "figures need", "plot")).partition(": ")[0])
        figures need no_such_package, which is not installed
    """
    return missing(purpose, (error.name or str(error)).partition(".")[0], extra)


def check(purpose: str, packages: Iterable[str], extra: str = "train") -> None:
    """Check that the packages of an extra are installed, without importing them.

    Args:
        purpose: what needs the packages, with a verb.
        packages: names of top-level packages.
        extra: the extra of blockwise-lr that installs them.

    Raises:
        ModuleNotFoundError: a package is missing; the message has the command that installs it.
        ImportError: a package is older than :data:`MINIMUM`; the message has the command that upgrades it.

    Example:
        >>> check("arrays need", ["numpy"])
    """
    for package in packages:
        if not is_installed(package):
            raise missing(purpose, package, extra)
        least, found = MINIMUM.get(package), _version(package)
        if least is not None and found and _numbers(found) < _numbers(least):
            raise ImportError(
                f"{purpose} {package} {least} or newer, and {found} is installed: pip install '{package}>={least}'",
                name=package,
            )


def is_installed(package: str) -> bool:
    """Return whether a top-level package can be imported, without importing it.

    Example:
        >>> is_installed("numpy"), is_installed("no_such_package")
        (True, False)
    """
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: the module has no spec
        return sys.modules.get(package) is not None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _repository() -> str | None:
    try:
        entries = metadata.metadata("blockwise-lr").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:  # the package is not installed; its source folder is on sys.path
        return None
    urls = dict(entry.split(", ", 1) for entry in entries if ", " in entry)
    return next((url for label, url in urls.items() if label.lower() in _REPOSITORY), None)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a release, for comparison: (5, 10, 0) for "5.10.0.dev1"."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
