"""OLMo-core: an OptimGroupOverride for each group, as Python for a training script."""

from __future__ import annotations

import fnmatch

from blockwise_lr.export.fragments import GLOBS
from blockwise_lr.export.lines import header, literal, needed_lr, number, times
from blockwise_lr.export.patterns import find_patterns
from blockwise_lr.export.proof import only_match, prove
from blockwise_lr.export.rates import Rates


def write_olmo_core(rates: Rates) -> str:
    """Return Python that defines `optim`, an ``AdamWConfig``.

    OLMo-core's rule (3.0.0, olmo_core/optim/config.py, OptimConfig.build_groups): fnmatch, a pattern without a match is
    an error, and so is a parameter in two overrides (torch refuses it). Its schedulers multiply each group's
    initial_lr, so they keep the ratios.
    """
    lr = needed_lr(rates, "OLMo-core")
    patterns = find_patterns(rates.names, GLOBS)
    prove(
        "OLMo-core",
        rates.label_of,
        only_match(patterns, lambda pattern, name: fnmatch.fnmatch(name, pattern)),
    )
    lines = [
        *header(rates, "OLMo-core"),
        "from olmo_core.optim import AdamWConfig, OptimGroupOverride",
        "",
        f"LR = {number(lr)}",
        "",
        "optim = AdamWConfig(",
        "    lr=LR,",
        f"    weight_decay={number(rates.base_decay)},",
        "    betas=(0.9, 0.95),",
        "    group_overrides=[",
    ]
    for group in rates.groups:
        params = ", ".join(map(literal, patterns[group.label]))
        lines += [
            f"        OptimGroupOverride(  # {group.label}",
            f"            params=[{params}],",
            f'            opts={{"lr": {times(group)}, "weight_decay": {number(group.weight_decay)}}},',
            "        ),",
        ]
    return "\n".join([*lines, "    ],", ")", ""])
