"""Find few and readable patterns that match the parameters of each group and no others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from blockwise_lr.errors import UserError
from blockwise_lr.export.fragments import NUMBER, Fragment, Style

_LONGEST_RUN = 5  # components of a name in one fragment
_SHORTEST_AFFIX = 3  # letters that the components of several names share, such as "norm"

_Kind = tuple[str, ...]


def find_patterns(
    groups: Mapping[str, Iterable[str]], style: Style, *, others: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Return patterns for each group: every name is matched by patterns of its own group alone.

    Names that differ in a layer's number count once, unless the number decides the group. The shortest fragment that
    covers the most of these kinds is taken first; then those that the others make superfluous are dropped. Because no
    pattern matches a name of another group, the order of the groups does not matter.

    Args:
        groups: the names of the parameters of each group.
        style: the kind of pattern.
        others: further names that no pattern may match.

    Raises:
        UserError: no pattern of this kind tells a parameter from those of other groups; the message names both.

    Example:
        >>> from blockwise_lr.export.fragments import SEARCHED
        >>> find_patterns({"qk": ["h.0.q.weight", "h.0.k.weight"], "norm": ["h.0.norm.weight"]}, SEARCHED)
        {'qk': ['\\\\.(?:q|k)\\\\.'], 'norm': ['\\\\.norm\\\\.']}
    """
    owner = {name: label for label, names in groups.items() for name in names}
    owner |= dict.fromkeys(others, "")
    kinds = _kinds(owner)
    found = {}
    for label in groups:
        own = {kind: names for kind, names in kinds.items() if owner[names[0]] == label}
        foreign = [names for names in kinds.values() if owner[names[0]] != label]
        found[label] = style.join(_cover(own, foreign, style))
    return found


def under_wrappers(groups: Mapping[str, Iterable[str]], prefixes: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of each group as they are and behind each prefix, which wrappers of a model put before them.

    Example:
        >>> under_wrappers({"emb": ["embed.weight"]}, ["module."])
        {'emb': ['embed.weight', 'module.embed.weight']}
    """
    return {
        label: [before + name for before in ("", *prefixes) for name in names]
        for label, names in groups.items()
    }


def _kinds(owner: Mapping[str, str]) -> dict[_Kind, list[str]]:
    """Return the names of each kind: those that differ in numbers alone, unless a number decides the group."""
    alike: dict[_Kind, list[str]] = {}
    for name in owner:
        alike.setdefault(_numbers_replaced(name.split("."), ()), []).append(name)
    kinds: dict[_Kind, list[str]] = {}
    for kind, names in alike.items():
        numbers = [i for i, word in enumerate(kind) if word == NUMBER]
        # Keep as few numbers as decide the group: none, one, or all.
        for kept in ((), *((i,) for i in numbers), tuple(numbers)):
            finer: dict[_Kind, list[str]] = {}
            for name in names:
                finer.setdefault(_numbers_replaced(name.split("."), kept), []).append(name)
            if all(len({owner[name] for name in members}) == 1 for members in finer.values()):
                break
        kinds |= finer
    return kinds


def _numbers_replaced(words: Sequence[str], kept: Sequence[int]) -> _Kind:
    return tuple(NUMBER if word.isdigit() and i not in kept else word for i, word in enumerate(words))


def _cover(own: Mapping[_Kind, list[str]], foreign: Sequence[list[str]], style: Style) -> list[Fragment]:
    """Return fragments that cover all kinds of one group and match no foreign name."""
    covered: dict[Fragment, frozenset[_Kind]] = {}
    for fragment in _candidates(list(own)):
        pattern = style.write(fragment)
        # One name of each kind first: that rules out most fragments.
        if pattern is None or any(style.matches(pattern, names[0]) for names in foreign):
            continue
        covered[fragment] = frozenset(kind for kind in own if style.matches(pattern, own[kind][0]))
    chosen: list[Fragment] = []
    missing = set(own)
    while missing:
        # Components come before affixes of the same reach, since they are easier to read.
        best = max(
            covered,
            key=lambda each: (len(covered[each] & missing), not each.is_affix, -each.length),
            default=None,
        )
        if best is None or not covered[best] & missing:
            kind = min(missing)
            exact = [Fragment(tuple(name.split(".")), "start", "end") for name in own[kind]]
            for fragment, name in zip(exact, own[kind]):
                if _of_all_names(fragment, {kind: [name]}, foreign, style) is None:
                    raise UserError(
                        f"no {style.name} matches {name} without a parameter of another block: "
                        "give the two blocks one ratio, or rename the parameter"
                    )
                covered[fragment] = frozenset({kind})
            chosen += exact
            missing.remove(kind)
            continue
        holds = _of_all_names(best, {kind: own[kind] for kind in covered[best]}, foreign, style)
        if holds != covered[best]:
            covered[best] = holds or frozenset()
            continue
        chosen.append(best)
        missing -= holds
    for fragment in list(chosen):
        rest = set().union(*(covered[each] for each in chosen if each is not fragment))
        if rest >= set(own) and sum(covered[each] == covered[fragment] for each in chosen) == 1:
            chosen.remove(fragment)
    order = list(own)
    return sorted(chosen, key=lambda each: min(order.index(kind) for kind in covered[each]))


def _of_all_names(
    fragment: Fragment, own: Mapping[_Kind, list[str]], foreign: Iterable[list[str]], style: Style
) -> frozenset[_Kind] | None:
    """Return the kinds of which the fragment matches every name; None if it matches a foreign name."""
    pattern = style.write(fragment)
    if pattern is None or any(style.matches(pattern, name) for names in foreign for name in names):
        return None
    return frozenset(
        kind for kind, names in own.items() if all(style.matches(pattern, name) for name in names)
    )


def _candidates(own: Sequence[_Kind]) -> Iterable[Fragment]:
    found: dict[Fragment, None] = {}
    for kind in own:
        for start, end in itertools.combinations(range(len(kind) + 1), 2):
            if end - start > _LONGEST_RUN and end - start < len(kind):
                continue
            before, after = "start" if start == 0 else "dot", "end" if end == len(kind) else "dot"
            found[Fragment(kind[start:end], before, after)] = None
    words = {(word, i == len(kind) - 1) for kind in own for i, word in enumerate(kind) if word != NUMBER}
    for (one, one_last), (other, other_last) in itertools.combinations(sorted(words), 2):
        suffix = _common_prefix(one[::-1], other[::-1])[::-1]
        if len(suffix) >= _SHORTEST_AFFIX and one_last == other_last:
            found[Fragment((suffix,), "any", "end" if one_last else "dot")] = None
        prefix = _common_prefix(one, other).rstrip("0123456789")
        if len(prefix) >= _SHORTEST_AFFIX:
            found[Fragment((prefix,), "dot", "any")] = None
    return found


def _common_prefix(one: str, other: str) -> str:
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other))
    return "".join(letter for letter, _ in equal)
