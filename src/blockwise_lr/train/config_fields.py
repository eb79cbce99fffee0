"""Turn the fields of nested dataclasses into mappings, and back with every value checked."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from blockwise_lr.errors import UserError

T = TypeVar("T")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with names joined by dots.

    Example:
        >>> flatten({"steps": 3, "optim": {"base_lr": 0.1}})
        {'steps': 3, 'optim.base_lr': 0.1}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Return an instance of a dataclass from nested mappings of its fields, each checked against its annotation.

    Args:
        cls: the dataclass. Its fields may be dataclasses, numbers, text, Literals, tuples or None.
        values: the fields; missing ones have their defaults.
        where: prefix of a field's name in error messages.

    Raises:
        UserError: a field does not exist, or a value has the wrong type.
    """
    hints = get_type_hints(cls)
    unknown = sorted(map(str, set(values) - set(hints)))
    if unknown:
        name = unknown[0] if unknown[0].isidentifier() else repr(unknown[0])
        raise UserError(f"configuration: no field named {where}{name}; the fields are {', '.join(hints)}")
    fields = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise UserError(f"configuration: {where}{name} is {value!r}; expected an object of fields")
            fields[name] = from_mapping(cast("type[Any]", hint), value, f"{where}{name}.")
        elif not _fits(value, hint):
            raise UserError(f"configuration: {where}{name} is {value!r}; expected {_spell(hint)}")
        elif get_origin(hint) is tuple:
            fields[name] = tuple(value)
        else:
            is_number = hint is float or (float in get_args(hint) and value is not None)
            fields[name] = float(value) if is_number else value
    return cls(**fields)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:  # a tuple of any length, which JSON stores as a list
        return isinstance(value, (list, tuple)) and all(_fits(each, get_args(hint)[0]) for each in value)
    options = get_args(hint) or (hint,)  # `int | None` has its alternatives as arguments
    if isinstance(value, bool):
        return bool in options
    if float in options and isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return any(isinstance(value, option) for option in options)


def _spell(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {_spell(get_args(hint)[0])}"
    return hint.__name__ if isinstance(hint, type) else str(hint)
