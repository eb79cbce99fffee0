"""fairseq2: the groups of its AdamW, as YAML for a recipe."""

from __future__ import annotations

import re

from blockwise_lr.export.fragments import ANCHORED
from blockwise_lr.export.lines import header, needed_lr, number, quoted
from blockwise_lr.export.patterns import find_patterns, under_wrappers
from blockwise_lr.export.proof import first_match, prove
from blockwise_lr.export.rates import Rates


def write_fairseq2(rates: Rates) -> str:
    """Return YAML with the key `optimizer`.

    fairseq2's rule (0.8.1, fairseq2/recipe/optim.py, prepare_parameter_groups): a pattern matches a name that equals it
    or by re.match, which begins at the start of the name; the first matching group wins. Under DDP, names begin with
    "module.". A schedule with one final_lr
    brings all groups to it; with final_lr_scale (the default) it keeps the ratios.
    """
    lr = needed_lr(rates, "fairseq2")
    names = under_wrappers(rates.names, ("module.",))
    patterns = find_patterns(names, ANCHORED)

    def matches(pattern: str, name: str) -> bool:
        return name == pattern or re.match(pattern, name) is not None

    labels = {name: label for label, own in names.items() for name in own}
    prove("fairseq2", labels, first_match(patterns, matches))
    lines = [
        *header(rates, "fairseq2"),
        "optimizer:",
        "  name: adamw",
        "  config:",
        f"    lr: {number(lr)}",
        f"    weight_decay: {number(rates.base_decay)}",
        "    betas: [0.9, 0.95]",
        "    groups:",
    ]
    for group in rates.groups:
        lines += [
            f"      - params: [{', '.join(map(quoted, patterns[group.label]))}]  # {group.label}",
            f"        lr: {number(group.lr_ratio * lr)}",
            f"        weight_decay: {number(group.weight_decay)}",
        ]
    return "\n".join([*lines, ""])
