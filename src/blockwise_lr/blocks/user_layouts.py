"""The layouts of fused weights that users state: for one call (`layout=`) or for all later calls (register_layout)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from blockwise_lr.blocks.known_layouts import HEADS, setting
from blockwise_lr.blocks.layout import PART_BLOCKS, Layout, Projection

KEY_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "n_kv_head",
    "kv_heads",
    "num_query_groups",
    "n_query_groups",
)

LayoutLike: TypeAlias = "str | Layout | Callable[[nn.Module, int], str | Layout]"
"""A layout in words, a `Layout`, or a function of the attention module and the weight's number of outputs."""

LayoutArgument: TypeAlias = "LayoutLike | Mapping[str | type[nn.Module], LayoutLike]"
"""The `layout=` of :func:`split_fused` and :func:`classify`."""


class _Registered(NamedTuple):
    target: str | type[nn.Module]
    layout: LayoutLike


_REGISTRY: list[_Registered] = []


def register_layout(target: str | type[nn.Module], layout: LayoutLike) -> Callable[[], None]:
    r"""Register how an attention class lays out its fused weight, for :func:`split_fused` and :func:`classify`.

    Args:
        target: the attention's class, which includes its subclasses; or a regular expression that matches the whole of
            `"Class"` or `"Class.child"`, e.g. ``r"MyAttention\.qkv"`` if the class has several fused weights.
        layout: one of these:

            - "q k v": all rows of the queries, then all keys, then all values (the parts in any order);
            - "q k v per head": head by head;
            - "q k v per group": for each key-value head, the queries of its group, its key and its value;
            - ``Layout(parts, repeats)`` with the widths of the parts in outputs;
            - a function `layout(attention, width)` that returns one of these.

    Returns:
        A function that undoes the registration. Of several registrations for a class, the latest counts.

    Raises:
        TypeError: the target is neither a module class nor a string.
        ValueError: the target is not a valid regular expression, or the layout names an unknown part.

    Example:
        >>> class MyAttention(nn.Module):
        ...     n_head = 2
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv, self.proj = nn.Linear(4, 12, bias=False), nn.Linear(4, 4, bias=False)
        >>> undo = register_layout(MyAttention, "q k v per head")
        >>> from blockwise_lr import split_fused
        >>> [p.shape[0] for p in split_fused(MyAttention()).qkv.parameters()]
        [4, 4, 4]
        >>> undo()
    """
    _check_target(target, "register_layout")
    _check_words(layout)
    entry = _Registered(target, layout)
    _REGISTRY.append(entry)

    def undo() -> None:
        _REGISTRY[:] = [each for each in _REGISTRY if each is not entry]

    return undo


def registered_layout(attention: nn.Module, child: str, projection: Projection, width: int) -> Layout | None:
    """Return the registered layout of a fused weight; None if there is none."""
    for target, layout in reversed(_REGISTRY):
        if _is_of_class(attention, child, target):
            return resolve(layout, attention, child, projection, width)
    return None


class UserLayouts:
    """The `layout=` argument of one call.

    Args:
        stated: one layout for every fused weight whose layout is otherwise unknown; or a mapping to layouts that
            override everything else. A key is an attention class or a regular expression, searched in the parameter's
            name.

    Raises:
        TypeError, ValueError: a key or a layout is not valid.
    """

    def __init__(self, stated: LayoutArgument | None) -> None:
        self._keyed: Mapping[str | type[nn.Module], LayoutLike] = (
            stated if isinstance(stated, Mapping) else {}
        )
        self._default: LayoutLike | None = None if isinstance(stated, Mapping) else stated
        self._used: set[object] = set()
        for key in self._keyed:
            _check_target(key, "layout=")
        for layout in [*self._keyed.values(), *([] if self._default is None else [self._default])]:
            _check_words(layout)

    def keyed(
        self, name: str, attention: nn.Module, child: str, projection: Projection, width: int
    ) -> Layout | None:
        """Return the layout of the first key that matches a weight, or None."""
        for key, layout in self._keyed.items():
            if re.search(key, name) if isinstance(key, str) else isinstance(attention, key):
                self._used.add(key)
                return resolve(layout, attention, child, projection, width)
        return None

    def default(self, attention: nn.Module, child: str, projection: Projection, width: int) -> Layout | None:
        """Return the layout stated without a key, or None."""
        return None if self._default is None else resolve(self._default, attention, child, projection, width)

    def check_used(self, names: Iterable[str]) -> None:
        """Raise ValueError, with the names of the unsplit fused weights, if a key matched none of them."""
        unused = [key for key in self._keyed if key not in self._used]
        if unused:
            shown = ", ".join(f'r"{k}"' if isinstance(k, str) else k.__name__ for k in unused)
            raise ValueError(
                f"layout= names {shown}, which matches no fused weight that is not split yet; "
                f"there are: {', '.join(names) or 'none'}"
            )


def resolve(
    layout: LayoutLike, attention: nn.Module, child: str, projection: Projection, width: int
) -> Layout:
    """Return a stated layout as a :class:`Layout` of a weight with `width` outputs.

    Raises:
        ValueError: the parts do not fill the weight, or the attention has no number of heads.
    """
    where = f"{type_before_parametrizations(attention).__name__}.{child}"
    if callable(layout) and not isinstance(layout, Layout):
        layout = layout(attention, width)
        _check_words(layout)
    if isinstance(layout, str):
        layout = _in_words(layout, attention, where, projection, width)
    total, repeats = sum(size for _, size in layout.parts), layout.repeats or 1
    if total != width or any(size % repeats for _, size in layout.parts):
        raise ValueError(
            f"the layout {layout} of {where} does not fit: expected parts of {width} outputs in all, each a multiple "
            f"of the {repeats} repeats"
        )
    return layout


def _in_words(words: str, attention: nn.Module, where: str, projection: Projection, width: int) -> Layout:
    parts, unit = _parsed(words)
    widths = dict(projection.parts)
    known = set(widths) == set(parts) and sum(widths.values()) == width
    if unit == "head":
        known, repeats = False, setting(attention, *HEADS)
    elif unit == "group":
        repeats = setting(attention, *KEY_HEADS)
    else:
        repeats = 1
    sizes = tuple((part, widths[part] if known else width // len(parts)) for part in parts)
    if not repeats or sum(size for _, size in sizes) != width or any(size % repeats for _, size in sizes):
        missing = (
            f"{'the number of ' + unit + 's' if unit else 'the widths'} cannot be told from its attributes"
        )
        example = ", ".join(f'("{part}", {width // len(parts)})' for part in parts)
        raise ValueError(
            f"the layout {words!r} of {where} is not complete, because {missing}: give "
            f"Layout(parts, repeats) with the parts' numbers of rows, such as Layout(({example}), repeats=1)"
        )
    return Layout(sizes, repeats)


def _parsed(words: str) -> tuple[list[str], str]:
    found = re.fullmatch(r"(?P<parts>\w+([ ,]+\w+)*?)( per (?P<unit>head|group))?", words.strip())
    parts = re.split(r"[ ,]+", found["parts"]) if found else []
    if found is None or len(set(parts)) != len(parts) or not set(parts) <= set(PART_BLOCKS):
        raise ValueError(
            f'{words!r} is no layout: expected different parts of {", ".join(PART_BLOCKS)} in their order, and "per '
            'head" or "per group" if they repeat, such as "q k v" or "q k v per head"'
        )
    return parts, found["unit"] or ""


def _check_words(layout: object) -> None:
    if isinstance(layout, str):
        _parsed(layout)
    elif isinstance(layout, Layout):
        unknown = [part for part, _ in layout.parts if part not in PART_BLOCKS]
        if unknown:
            raise ValueError(f"{layout} has the part {unknown[0]!r}; the parts are: {', '.join(PART_BLOCKS)}")
    elif not callable(layout):
        raise TypeError(
            f'a layout is words such as "q k v", a Layout(parts, repeats) or a function; got {layout!r}'
        )


def _check_target(target: object, where: str) -> None:
    if isinstance(target, str):
        try:
            re.compile(target)
        except re.error as error:
            raise ValueError(f'{where}: r"{target}" is not a valid regular expression: {error}') from None
    elif not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise TypeError(
            f"{where}: {target!r} is a {type(target).__name__}; expected a module class or a string"
        )


def _is_of_class(attention: nn.Module, child: str, target: str | type[nn.Module]) -> bool:
    if isinstance(target, type):
        return isinstance(attention, target)
    return any(re.fullmatch(target, name) for name in _names(attention, child))


def _names(attention: nn.Module, child: str) -> Iterator[str]:
    name = type_before_parametrizations(attention).__name__
    yield name
    yield f"{name}.{child}"
