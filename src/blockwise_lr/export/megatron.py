"""Megatron-LM: a ParamGroupOverride for each group, as Python for its training script."""

from __future__ import annotations

import fnmatch

from blockwise_lr.export.fragments import GLOBS
from blockwise_lr.export.lines import header, literal, needed_lr, number, times
from blockwise_lr.export.patterns import find_patterns, under_wrappers
from blockwise_lr.export.proof import only_match, prove
from blockwise_lr.export.rates import Rates


def write_megatron(rates: Rates) -> str:
    """Return Python that defines `block_overrides`, the ``config_overrides`` of ``get_megatron_optimizer``.

    Megatron's rule (megatron-core 0.16.1, megatron/core/optimizer/__init__.py, _get_param_groups, and ParamKey.matches
    in optimizer_config.py): fnmatch, the overrides of all matching keys are merged, and two that disagree are an error.
    The names it sees begin with "module." for each wrapper: its DistributedDataParallel, and Float16Module with --bf16.
    Here every parameter matches exactly one key. The rates are absolute, and its schedules go from max_lr to min_lr.
    """
    lr, base = needed_lr(rates, "Megatron-LM"), rates.base_decay
    names = under_wrappers(rates.names, ("module.", "module.module."))
    patterns = find_patterns(names, GLOBS)
    prove(
        "Megatron-LM",
        {name: label for label, own in names.items() for name in own},
        only_match(patterns, lambda pattern, name: fnmatch.fnmatch(name, pattern)),
    )
    lines = [
        *header(rates, "Megatron-LM"),
        "from megatron.core.optimizer.optimizer_config import ParamKey",
        "from megatron.core.optimizer_param_scheduler import ParamGroupOverride",
        "",
        f"LR = {number(lr)}  # also your --lr",
        "MIN_LR = 0.0  # also your --min-lr: the floor that all blocks share",
        f"# Also set --weight-decay {number(base)}. These overrides replace Megatron's own, which exempt vectors",
        "# from weight decay.",
        "",
        "",
        "def override(lr, wd_mult=1.0):",
        "    return ParamGroupOverride(max_lr=lr, min_lr=min(MIN_LR, lr), wd_mult=wd_mult)",
        "",
        "",
        "block_overrides = {",
    ]
    for group in rates.groups:
        decay = "" if group.weight_decay == base else f", wd_mult={number(group.weight_decay / base)}"
        lines.append(
            f"    ParamKey(name=({_listed(patterns[group.label])},)): override({times(group)}{decay}),  # {group.label}"
        )
    return "\n".join([*lines, "}", ""])


def _listed(patterns: list[str]) -> str:
    return ", ".join(map(literal, patterns))
