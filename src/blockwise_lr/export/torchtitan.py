"""torchtitan: a ParamGroupConfig for each group, as Python for a config_registry.py."""

from __future__ import annotations

import re

from blockwise_lr.export.fragments import SEARCHED
from blockwise_lr.export.lines import header, needed_lr, number, raw, times
from blockwise_lr.export.patterns import find_patterns
from blockwise_lr.export.proof import first_match, prove
from blockwise_lr.export.rates import Rates


def write_torchtitan(rates: Rates) -> str:
    """Return Python that defines `optimizer`, an ``OptimizersContainer.Config``.

    torchtitan's rule (0.3.0, torchtitan/components/optimizer/optimizer.py, _build_param_groups): re.search, the first
    matching pattern wins, a pattern without a match is an error, every parameter must match, and a group inherits no
    setting. Its schedules multiply the rate of every group, so they keep the ratios.
    """
    lr = needed_lr(rates, "torchtitan")
    patterns = find_patterns(rates.names, SEARCHED)
    prove("torchtitan", rates.label_of, first_match(patterns, re.search))
    unfused = "# The model needs fuse_qkv=False: a fused weight wqkv can have only one learning rate."
    lines = [
        *header(rates, "torchtitan"),
        *([unfused] if any(".qkv_linear.wq." in name for name in rates.label_of) else []),
        "from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig",
        "",
        f"LR = {number(lr)}",
        'ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8}  # a group inherits nothing: all settings are here',
        "",
        "optimizer = OptimizersContainer.Config(",
        "    param_groups=[",
    ]
    for group in rates.groups:
        settings = f'{{"lr": {times(group)}, "weight_decay": {number(group.weight_decay)}, **ADAMW}}'
        lines += [
            f"        ParamGroupConfig(  # {group.label}",
            f"            pattern={raw(patterns[group.label][0])},",
            '            optimizer_name="AdamW",',
            f"            optimizer_kwargs={settings},",
            "        ),",
        ]
    return "\n".join([*lines, "    ],", ")", ""])
