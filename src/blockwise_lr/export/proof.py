"""Prove an export: apply the target's own matching rule to every parameter and compare with the block map."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from blockwise_lr.errors import UserError


def prove(target: str, expected: Mapping[str, str | None], assign: Callable[[str], str | None]) -> None:
    """Check that the target's rule puts every parameter into its group.

    Args:
        target: the target's name, for the message.
        expected: the group of each parameter; None for one that no pattern may match.
        assign: the target's rule: returns the group of a name, or None.

    Raises:
        UserError: the rule puts a parameter elsewhere; the message names it.
    """
    for name, label in expected.items():
        found = assign(name)
        if found != label:
            raise UserError(
                f"the patterns for {target} would put {name} into {found or 'no group'}, but its group is "
                f"{label or 'none'}: please report this model; as a remedy, give the two blocks one ratio"
            )


def first_match(
    groups: Mapping[str, list[str]], matches: Callable[[str, str], object]
) -> Callable[[str], str | None]:
    """Return the rule "the first group with a matching pattern".

    Example:
        >>> import re
        >>> rule = first_match({"qk": ["q|k"], "vo": ["v"]}, re.search)
        >>> rule("h.0.v"), rule("h.0.norm")
        ('vo', None)
    """
    return lambda name: next(
        (label for label, patterns in groups.items() if any(matches(each, name) for each in patterns)), None
    )


def only_match(
    groups: Mapping[str, list[str]], matches: Callable[[str, str], object]
) -> Callable[[str], str | None]:
    """Return the rule of targets that allow one group a parameter: all groups that match, joined by " and ".

    Example:
        >>> rule = only_match({"a": ["*q*"], "b": ["*k*"]}, lambda pattern, name: pattern.strip("*") in name)
        >>> rule("q"), rule("qk"), rule("v")
        ('a', 'a and b', None)
    """

    def assign(name: str) -> str | None:
        found = [label for label, patterns in groups.items() if any(matches(each, name) for each in patterns)]
        return " and ".join(found) or None

    return assign
