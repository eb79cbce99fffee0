"""The runs of one arm in one folder: how they are read, and what the runs of one model must share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockwise_lr.compare.results import read_run
from blockwise_lr.errors import UserError
from blockwise_lr.train.config import FREE_FIELDS, TrainConfig, config_from_dict
from blockwise_lr.train.config_fields import flatten
from blockwise_lr.train.presets import Setting
from blockwise_lr.train.run_folder import CHANGES

_FREE = FREE_FIELDS | {"seed", "init_seed", "data_seed", "log_every", "eval_every"}
"""Settings that may differ between the runs of an arm: the seeds, and those that change no terminal loss."""
_OF_ARM = frozenset(
    f"optim.{name}"
    for name in ("optimizer", "ratios", "base_lr", "warmup_fraction", "warmup_steps", "re_measure")
)
"""Settings that may differ between the arms of a size."""
_OF_OPTIMIZER = frozenset(f"optim.{name}" for name in ("beta1", "beta2", "eps", "weight_decay"))
"""Settings that may differ between arms of two optimizers."""


@dataclass(frozen=True)
class Source:
    """What the runs of one arm in one folder share.

    Args:
        folder: the folder of the comparison or of the run.
        config: the configuration of the runs, except for their seeds.
        data: the description of the text.
    """

    folder: Path
    config: TrainConfig
    data: Mapping[str, Any]


@dataclass(frozen=True)
class ArmRuns:
    """The runs of one arm in one folder.

    Args:
        arm: name of the arm.
        source: what the runs share.
        losses: the seed and the terminal validation loss of each run; +inf if the run diverged.
        setting: base learning rate and warm-up.
        untuned: whether the arm is known not to be tuned.
        baseline: whether the arm is the baseline of a comparison.
    """

    arm: str
    source: Source
    losses: Sequence[tuple[int, float]]
    setting: str
    untuned: bool = False
    baseline: bool = False


def read_comparison(folder: Path, arms: Sequence[str]) -> tuple[Source, list[ArmRuns]]:
    """Return the base configuration of a comparison, and the runs of its arms."""
    path = folder / "compare.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        base = Source(folder, config_from_dict(content["config"]), _object(content["data"]))
        found = [
            _arm_runs(base, name, arm, untuned=not content["tuned"] or name in content.get("at_edge", ()))
            for name, arm in content["arms"].items()
            if arm["horizon"] == "N" and (not arms or name in arms)
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read {path}: {_reason(error)}; run the compare command again to write it"
        ) from None
    return base, found


def _arm_runs(base: Source, name: str, arm: Mapping[str, Any], *, untuned: bool) -> ArmRuns:
    """Return the runs of one arm of compare.json."""
    warmup = arm["warmup_fraction"]
    optim = replace(
        base.config.optim,
        optimizer=str(arm["optimizer"]),
        ratios=str(arm["ratios"]),
        base_lr=float(arm["base_lr"]),
    )
    if warmup is not None:
        optim = replace(optim, warmup_fraction=float(warmup), warmup_steps=None)
    losses = [(int(run["seed"]), run["terminal_val_loss"]) for run in arm["seeds"]]
    return ArmRuns(
        name,
        replace(base, config=replace(base.config, optim=optim)),
        [(seed, math.inf if loss is None else float(loss)) for seed, loss in losses],
        str(Setting(arm["base_lr"], warmup)),
        untuned=untuned,
        baseline=arm["role"] == "baseline",
    )


def read_run_folder(folder: Path) -> ArmRuns:
    """Return the run of a folder that `train` has written.

    Raises:
        UserError: its configuration cannot be read, or its number of steps was changed on the way.
    """
    run = read_run(folder)
    try:
        config = config_from_dict(run.config["train"])
        source = Source(folder, config, _object(run.config.get("data")))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {folder / 'config.json'}: {_reason(error)}; delete the folder to run it again"
        ) from None
    if run.config.get(CHANGES):
        raise UserError(
            f"the number of steps of the run in {folder} was changed after it had begun, so its loss is not that of "
            "one schedule: leave the folder out, or train the run anew with another --out"
        )
    setting = str(Setting(config.optim.base_lr, config.optim.warmup_fraction))
    return ArmRuns(rule_of(config), source, [(config.seed, run.val_loss)], setting)


def rule_of(config: TrainConfig) -> str:
    return f"{config.optim.optimizer}:{config.optim.ratios}"


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def check_shared(first: Source, other: Source, arm: str | None) -> None:
    """Check that two sources of one model share every setting that their arms do not name.

    Args:
        first: a source.
        other: another source.
        arm: name of the arm, if both sources are of one arm.

    Raises:
        UserError: a setting or the text differs.
    """
    free, same = _FREE, f"runs of {arm} of the same model"
    if arm is None:
        same = "runs of the same model"
        optimizers = {first.config.optim.optimizer, other.config.optim.optimizer}
        free = free | _OF_ARM | (_OF_OPTIMIZER if len(optimizers) > 1 else frozenset())
    fields, others = _fields(first.config), _fields(other.config)
    differing = [name for name in fields if name not in free and fields[name] != others[name]]
    if first.data.get("content_sha256") and other.data.get("content_sha256"):
        # One text may have two names, such as a relative and an absolute path.
        differing = [name for name in differing if not name.startswith("data.")]
    found = [f"{name} ({fields[name]} and {others[name]})" for name in differing]
    found = [*token_differences(first, other), *found]
    if found:
        raise UserError(
            f"{first.folder} and {other.folder} hold {same} and differ in {', '.join(found)}, so their losses do not "
            "compare: leave one of the folders out, or train both with the same settings"
        )


def _fields(config: TrainConfig) -> dict[str, Any]:
    """Return every setting of a run, with the defaults of its optimizer in place of None."""
    try:
        optim = config.optim.resolved()
    except UserError:  # reading a loss does not need the optimizer's package
        optim = config.optim
    return flatten(replace(config, optim=optim).to_dict())


def token_differences(first: Source, other: Source) -> list[str]:
    """Return what makes the tokens of two sources differ, each with both values."""
    compared = (
        ("text", first.data.get("content_sha256"), other.data.get("content_sha256")),
        ("tokenizer", first.data.get("tokenizer_sha256"), other.data.get("tokenizer_sha256")),
        ("vocabulary", first.config.model.vocab_size, other.config.model.vocab_size),
        ("context", first.config.model.context, other.config.model.context),
    )
    return [
        f"{what} ({str(one)[:12]} and {str(two)[:12]})"
        for what, one, two in compared
        if one != two and None not in (one, two)
    ]
