"""The tables of a report that state how it was run: model, optimizer, text, hardware and software."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Set
from typing import Any

from blockwise_lr.compare.tables import Table, facts_table
from blockwise_lr.errors import UserError
from blockwise_lr.train.config import OptimConfig


def what_was_run(
    content: Mapping[str, Any], run: Mapping[str, Any], optimizers: Set[str], varied: Set[str]
) -> dict[str, Table]:
    """Return the tables "run", "model", "optim", "data", "hardware" and "versions".

    Args:
        content: the content of the report's JSON file, with "config", "data", "hardware", "versions", "git_commit".
        run: the facts of the table "run".
        optimizers: names of the optimizers of all arms.
        varied: settings of the optimizer that are not the same for all arms; they are left out.
    """
    config = content["config"]
    shared = _with_optimizer_defaults(config["optim"], optimizers)
    optim = {key: value for key, value in shared.items() if key not in varied}
    software = {**_as_facts("versions", content["versions"]), "git commit": content["git_commit"]}
    return {
        "run": facts_table("Run", run),
        "model": facts_table("Model", config["model"]),
        "optim": facts_table("Optimizer and schedule, shared by all arms", optim),
        "data": facts_table("Text", _as_facts("data", content["data"] or config["data"])),
        "hardware": facts_table("Hardware", _as_facts("machine", content["hardware"])),
        "versions": facts_table("Software", software),
    }


def _with_optimizer_defaults(optim: Mapping[str, Any], optimizers: Set[str]) -> dict[str, Any]:
    """Return the optimizer settings with the defaults of the optimizers filled in.

    If the optimizers of the arms have different defaults, the value lists each of them.

    Args:
        optim: the settings of the base configuration; None stands for the optimizer's default.
        optimizers: names of the optimizers of all arms.
    """
    defaults = {}
    for name in sorted(optimizers):
        # An optimizer of another package may not be installed where the report is rebuilt.
        with contextlib.suppress(UserError):
            defaults[name] = dataclasses.asdict(OptimConfig(optimizer=name).resolved())
    filled = dict(optim)
    for key in ("beta1", "beta2", "eps", "weight_decay"):
        if optim.get(key) is None:
            values = {name: settings[key] for name, settings in defaults.items()}
            same = len(set(values.values())) == 1
            each = ", ".join(
                f"{name} {'none' if v is None else format(v, 'g')}" for name, v in values.items()
            )
            filled[key] = next(iter(values.values())) if same else each
    return filled


def _as_facts(name: str, value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {name: value}
