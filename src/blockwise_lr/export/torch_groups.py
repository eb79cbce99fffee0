"""DeepSpeed and plain torch: the parameter groups as JSON, with the names of their parameters."""

from __future__ import annotations

import json

from blockwise_lr.export.lines import ratios_by_label
from blockwise_lr.export.proof import only_match, prove
from blockwise_lr.export.rates import Rates


def write_json(rates: Rates) -> str:
    """Return JSON with the key `groups`: name, block, lr, lr_ratio, weight_decay, and the parameters' names.

    Without a base learning rate, every lr is null, and the program that reads the file multiplies lr_ratio by its own.
    The rule is equality: torch's optimizers take parameters themselves, so each is looked up by its name.
    """
    prove("json", rates.label_of, only_match(rates.names, lambda pattern, name: pattern == name))
    groups = [
        {
            "name": group.label,
            "block": group.block,
            "lr": None if rates.lr is None else float(f"{group.lr_ratio * rates.lr:.12g}"),
            "lr_ratio": group.lr_ratio,
            "weight_decay": group.weight_decay,
            "parameters": list(group.names),
        }
        for group in rates.groups
    ]
    content = {
        "parameter_names": rates.naming,
        "lr": rates.lr,
        "ratios": ratios_by_label(rates),
        "lost": list(rates.lost),
        "groups": groups,
    }
    return json.dumps(content, indent=2) + "\n"
