"""register_rule: add rules of the user's own to `classify`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor, nn

from blockwise_lr.blocks.block import Block, canonical_name
from blockwise_lr.blocks.topology import Site, Tree, ancestors

Predicate = Callable[[str, Tensor, nn.Module], bool]
"""`predicate(name, parameter, module)` returns whether a rule applies to the parameter that `module` owns."""


@dataclass(frozen=True, eq=False)
class RegisteredRule:
    """A rule added by :func:`register_rule`.

    Remove it with `remove()`, by calling it, or by leaving its `with` block.

    Args:
        match: which parameters the rule applies to.
        block: their block.
        reason: why, in words.
    """

    match: str | type[nn.Module] | Predicate
    block: Block
    reason: str

    def remove(self) -> None:
        """Remove the rule. Removing it twice changes nothing."""
        _REGISTERED[:] = [rule for rule in _REGISTERED if rule is not self]

    def __call__(self) -> None:
        self.remove()

    def __enter__(self) -> RegisteredRule:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def holds(self, site: Site, tree: Tree) -> bool:
        """Return whether the rule applies to the parameter at this site."""
        if isinstance(self.match, str):
            return any(re.search(self.match, name) for name in (site.name, canonical_name(site.name)))
        if isinstance(self.match, type):
            return any(
                isinstance(tree.modules[path], self.match) for path in (site.path, *ancestors(site.path))
            )
        return bool(self.match(canonical_name(site.name), site.param, site.module))


_REGISTERED: list[RegisteredRule] = []


def register_rule(
    match: str | type[nn.Module] | Predicate, block: Block | str, reason: str
) -> RegisteredRule:
    """Assign some parameters to a block in every later call of :func:`classify` in this process.

    Registered rules apply after the `overrides` of a call and before the built-in rules. Of several that match, the
    latest counts. Unlike an override, a rule may match no parameter of a model.

    Args:
        match: a module class, which matches every parameter inside its instances; a regular expression, searched in
            the parameter's name (with and without wrapper prefixes); or a function `match(name, parameter, module)`,
            where `module` owns the parameter, that returns whether the rule applies.
        block: the block of these parameters, e.g. ``Block.FFN`` or ``"ffn"``.
        reason: why, in words; `BlockMap.reason` returns it.

    Returns:
        RegisteredRule: `.remove()` removes the rule; as a context manager it lasts for the `with` block.

    Raises:
        TypeError: `match` is none of these three, or `reason` is not a string.
        ValueError: `match` is not a valid regular expression, `block` is not a Block, or `reason` is empty.

    Example:
        >>> from blockwise_lr import classify
        >>> class Gate(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Parameter(Tensor(4, 2))
        >>> with register_rule(Gate, "other", "gates the residual stream"):
        ...     blocks = classify(nn.Sequential(nn.LayerNorm(4), Gate()))
        >>> blocks["1.table"].value, blocks.reason("1.table")
        ('other', 'gates the residual stream')
    """
    is_class = isinstance(match, type) and issubclass(match, nn.Module)
    if isinstance(match, nn.Module) or not (is_class or isinstance(match, str) or callable(match)):
        raise TypeError(
            f"register_rule got {match!r} to match; expected a module class, a regular expression (str) or a "
            "function of (name, parameter, module)"
        )
    if isinstance(match, type) and not is_class:
        raise TypeError(
            f"register_rule got the class {match.__name__}, which is no nn.Module; expected a module class, a regular "
            "expression (str) or a function of (name, parameter, module)"
        )
    if isinstance(match, str):
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(
                f'register_rule: r"{match}" is not a valid regular expression: {error}'
            ) from None
    if not isinstance(reason, str):
        raise TypeError(f"register_rule: reason is {reason!r}; expected a sentence (str) that says why")
    if not reason.strip():
        raise ValueError("register_rule: reason is empty; expected a sentence that says why")
    rule = RegisteredRule(match, _block(block), reason)
    _REGISTERED.append(rule)
    return rule


def registered_rule(site: Site, tree: Tree) -> RegisteredRule | None:
    """Return the latest registered rule that applies to a parameter, or None."""
    return next((rule for rule in reversed(_REGISTERED) if rule.holds(site, tree)), None)


def _block(value: Block | str) -> Block:
    try:
        return Block(value)
    except ValueError:
        names = ", ".join(block.value for block in Block)
        raise ValueError(f"register_rule: {value!r} is no Block; the blocks are: {names}") from None
