"""timm: a function that makes parameter groups, as a Python module that needs only re."""

from __future__ import annotations

import re

from blockwise_lr.export.fragments import SEARCHED
from blockwise_lr.export.lines import header, number, raw
from blockwise_lr.export.patterns import find_patterns
from blockwise_lr.export.proof import first_match, prove
from blockwise_lr.export.rates import Rates

_FUNCTION = '''


def block_groups(model):
    """Return the groups, for create_optimizer_v2(model, "adamw", lr=LR, param_group_fn=block_groups)."""
    groups = [
        {"params": [], "lr_scale": scale, "weight_decay": decay, "block": block}
        for block, _, scale, decay in GROUPS
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = [i for i, (_, pattern, _, _) in enumerate(GROUPS) if re.search(pattern, name)]
            if len(found) != 1:
                raise ValueError(f"{name} matches {len(found)} groups; expected 1: export the patterns again")
            groups[found[0]]["params"].append(parameter)
    return groups
'''


def write_timm(rates: Rates) -> str:
    """Return Python that defines `block_groups`, for timm's ``create_optimizer_v2(param_group_fn=...)``.

    timm's rule (1.0.31, timm/scheduler/scheduler.py, Scheduler.update_groups): its schedules set each group's rate to
    ``lr_scale`` times the scheduled one. A group has no rate of its own here, or the ratio would count twice.
    """
    patterns = find_patterns(rates.names, SEARCHED)
    prove("timm", rates.label_of, first_match(patterns, re.search))
    lines = [*header(rates, "timm"), "import re", ""]
    lines += [] if rates.lr is None else [f"LR = {number(rates.lr)}"]
    lines.append("GROUPS = [  # block, pattern, lr_scale (timm's schedules multiply by it), weight decay")
    for group in rates.groups:
        lines.append(
            f'    ("{group.label}", {raw(patterns[group.label][0])}, {number(group.lr_ratio)}, '
            f"{number(group.weight_decay)}),"
        )
    return "\n".join([*lines, "]"]) + _FUNCTION
