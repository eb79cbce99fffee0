"""NeMo AutoModel: param_group_overrides of its optimizer, as YAML for a recipe."""

from __future__ import annotations

import re

from blockwise_lr.export.fragments import SEARCHED
from blockwise_lr.export.lines import header, number, quoted
from blockwise_lr.export.patterns import find_patterns
from blockwise_lr.export.proof import first_match, prove
from blockwise_lr.export.rates import RateGroup, Rates


def write_automodel(rates: Rates) -> str:
    """Return YAML with the key `optimizer`.

    AutoModel's rule (0.7.0, nemo_automodel/components/optim/optimizer.py, _build_param_groups): re.search, the first
    matching override wins, other parameters have the base rate. Its scheduler multiplies every group's rate and weight
    decay by lr_mult and wd_mult. Groups whose multipliers are 1 need no override.
    """
    base = rates.base_decay
    overridden = [group for group in rates.groups if group.lr_ratio != 1 or group.weight_decay != base]
    own = {group.label: list(group.names) for group in overridden}
    others = [name for name, label in rates.label_of.items() if label not in own]
    patterns = find_patterns(own, SEARCHED, others=others)
    expected = {name: label if label in own else None for name, label in rates.label_of.items()}
    prove("AutoModel", expected, first_match(patterns, re.search))
    lines = [*header(rates, "NeMo AutoModel"), "optimizer:", "  _target_: torch.optim.AdamW"]
    lines += [f"  lr: {number(rates.lr)}"] if rates.lr is not None else []
    lines += [f"  weight_decay: {number(base)}", "  betas: [0.9, 0.95]"]
    lines += ["  param_group_overrides:"] if overridden else []
    for group in overridden:
        lines += [
            f"    - pattern: {quoted(patterns[group.label][0])}  # {group.label}",
            *_multipliers(group, base),
        ]
    return "\n".join([*lines, ""])


def _multipliers(group: RateGroup, base: float) -> list[str]:
    lines = [f"      lr_mult: {number(group.lr_ratio)}"]
    if group.weight_decay != base:
        lines.append(f"      wd_mult: {number(group.weight_decay / base)}")
    return lines
