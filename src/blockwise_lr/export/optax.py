"""optax: a label for each leaf of a pytree of parameters, and a transformation for each label, as Python."""

from __future__ import annotations

import re
from dataclasses import replace

from blockwise_lr.export.fragments import SEARCHED
from blockwise_lr.export.lines import header, number, raw
from blockwise_lr.export.patterns import find_patterns
from blockwise_lr.export.proof import first_match, prove
from blockwise_lr.export.rates import Rates

_LEAVES = ("kernel", "scale", "embedding")
"""Flax's names for what torch calls weight. No pattern relies on the last component, so any of them does."""

_FUNCTIONS = '''


def labels(params):
    """Return the tree of labels: the block of each leaf, found by its path."""

    def label(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removeprefix("params.")
        found = [block for block, pattern, _, _ in GROUPS if re.search(pattern, name)]
        if len(found) != 1:
            raise ValueError(f"{name} matches {len(found)} blocks; expected 1: export the patterns again")
        return found[0]

    return jax.tree_util.tree_map_with_path(label, params)


def adamw_by_block(learning_rate, b1=0.9, b2=0.95):
    """Return AdamW with a learning rate by block; `learning_rate` is a number or a schedule."""

    def scaled(ratio):
        if callable(learning_rate):
            return lambda count: ratio * learning_rate(count)
        return ratio * learning_rate

    return optax.partition(
        {
            block: optax.adamw(scaled(ratio), b1=b1, b2=b2, weight_decay=decay)
            for block, _, ratio, decay in GROUPS
        },
        labels,
    )
'''


def write_optax(rates: Rates) -> str:
    """Return Python that defines `labels` and `adamw_by_block`, for ``optax.partition``.

    optax's rule (0.2.8, optax/transforms/_combining.py, partition): a tree of labels, or a function that returns one,
    chooses the transformation of each leaf. The path of a leaf is matched by re.search, under Flax's leaf names too.
    """
    rates = replace(rates, groups=tuple(replace(g, names=_with_flax_leaves(g.names)) for g in rates.groups))
    patterns = find_patterns(rates.names, SEARCHED)
    prove("optax", rates.label_of, first_match(patterns, re.search))
    lines = [*header(rates, "optax"), "import re", "", "import jax", "import optax", ""]
    lines += [] if rates.lr is None else [f"LR = {number(rates.lr)}"]
    lines.append("GROUPS = [  # block, pattern, ratio to the base learning rate, weight decay")
    for group in rates.groups:
        lines.append(
            f'    ("{group.label}", {raw(patterns[group.label][0])}, {number(group.lr_ratio)}, '
            f"{number(group.weight_decay)}),"
        )
    return "\n".join([*lines, "]"]) + _FUNCTIONS


def _with_flax_leaves(names: tuple[str, ...]) -> tuple[str, ...]:
    found = dict.fromkeys(names)
    for name in names:
        module, _, leaf = name.rpartition(".")
        found |= {f"{module}.{each}": None for each in _LEAVES if module and leaf == "weight"}
    return tuple(found)
