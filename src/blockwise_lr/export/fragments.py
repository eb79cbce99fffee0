"""Pieces of parameter names, and how each kind of pattern writes them and matches them."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

NUMBER = "#"
"""Stands for any number among the components of a name."""


class Fragment(NamedTuple):
    """Adjacent components of a parameter's name, such as ``self_attn.q_proj``.

    Args:
        components: the components; :data:`NUMBER` stands for any number.
        start: what precedes them: "start" of the name, a "dot", or "any" text, even the beginning of the component.
        end: what follows them: the "end" of the name, a "dot", or "any" text.
    """

    components: tuple[str, ...]
    start: str
    end: str

    @property
    def length(self) -> int:
        """The number of characters, with a penalty for wildcards."""
        return len(".".join(self.components)) + 8 * self.components.count(NUMBER)

    @property
    def is_affix(self) -> bool:
        """Whether the fragment is the beginning or the end of a component."""
        return "any" in (self.start, self.end)


class Style(NamedTuple):
    """One kind of pattern.

    Args:
        name: the kind, for messages.
        write: returns the pattern of a fragment, or None if this kind cannot express it.
        matches: whether a pattern matches a name.
        join: joins the patterns of one group: into one expression, or into a list.
    """

    name: str
    write: Callable[[Fragment], str | None]
    matches: Callable[[str, str], bool]
    join: Callable[[Iterable[Fragment]], list[str]]


def _regex(fragment: Fragment, inner: str | None = None) -> str:
    words = (r"\d+" if word == NUMBER else re.escape(word) for word in fragment.components)
    start = {"start": "^", "dot": r"\.", "any": ""}[fragment.start]
    end = {"end": "$", "dot": r"\.", "any": ""}[fragment.end]
    return start + (r"\.".join(words) if inner is None else inner) + end


def _glob(fragment: Fragment) -> str:
    words = ("[0-9]*" if word == NUMBER else glob.escape(word) for word in fragment.components)
    start = {"start": "", "dot": "*.", "any": "*"}[fragment.start]
    return start + ".".join(words) + {"end": "", "dot": ".*", "any": "*"}[fragment.end]


def _substring(fragment: Fragment) -> str | None:
    if NUMBER in fragment.components:
        return None
    start, end = ("." if side == "dot" else "" for side in (fragment.start, fragment.end))
    return start + ".".join(fragment.components) + end


def _merged(fragments: Iterable[Fragment]) -> list[str]:
    """Return regular expressions; fragments that differ in one component alone share one."""
    alike: dict[tuple[str, str, tuple[str, ...]], list[Fragment]] = {}
    for fragment in fragments:
        alike.setdefault((fragment.start, fragment.end, fragment.components[:-1]), []).append(fragment)
    found = []
    for (_, _, before), members in alike.items():
        if len(members) == 1:
            found.append(_regex(members[0]))
            continue
        last = [
            r"\d+" if each.components[-1] == NUMBER else re.escape(each.components[-1]) for each in members
        ]
        prefix = "".join((r"\d+" if word == NUMBER else re.escape(word)) + r"\." for word in before)
        found.append(_regex(members[0], f"{prefix}(?:{'|'.join(last)})"))
    return found


def _anchored(pattern: str) -> str:
    return pattern.removeprefix("^") if pattern.startswith("^") else f".*{pattern}"


def _each(write: Callable[[Fragment], str | None]) -> Callable[[Iterable[Fragment]], list[str]]:
    return lambda fragments: [pattern for fragment in fragments if (pattern := write(fragment)) is not None]


SEARCHED = Style(
    "regular expression",
    _regex,
    lambda pattern, name: re.search(pattern, name) is not None,
    lambda fragments: ["|".join(_merged(fragments))],
)
"""One regular expression a group, for ``re.search``."""

ANCHORED = Style(
    "anchored regular expression",
    lambda fragment: _anchored(_regex(fragment)),
    lambda pattern, name: re.match(pattern, name) is not None,
    lambda fragments: [_anchored(pattern) for pattern in _merged(fragments)],
)
"""A list of regular expressions a group, for ``re.match``, which begins at the start of the name."""

GLOBS = Style("wildcard", _glob, lambda pattern, name: fnmatch.fnmatch(name, pattern), _each(_glob))
"""A list of wildcards a group, for ``fnmatch``."""

SUBSTRINGS = Style("substring", _substring, lambda pattern, name: pattern in name, _each(_substring))
"""A list of substrings a group."""
