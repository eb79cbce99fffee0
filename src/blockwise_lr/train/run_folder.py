"""A run's folder: whose it is, whether it is finished, and where it goes on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockwise_lr.checkpoints.manifest import checkpoint_step, newest_whole
from blockwise_lr.errors import UserError
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.config import TrainConfig, config_from_dict, identity

CONFIG, RESULT = "config.json", "result.json"
CHANGES = "changes"
"""In config.json and result.json: at which steps of the run its number of steps was changed, and to what."""


def missing(path: Path) -> list[Path]:
    """`path` and the folders above it that are not there yet, innermost first."""
    return [each for each in (path, *path.parents) if not each.exists()]


def take_back(made: Sequence[Path]) -> None:
    """After a refusal: remove what was :func:`missing` before, but no folder with anything in it."""
    for path in made:
        if not path.is_dir():
            path.unlink(missing_ok=True)
            continue
        with contextlib.suppress(OSError):
            path.rmdir()


def as_begun(config: TrainConfig, out: Path, say: Callable[[str], None]) -> TrainConfig:
    """Return `config` with the warm-up that an earlier version began the run in `out` with.

    Its config.json does not name ``warmup_start``: its warm-up began at 0, and the run goes on in that way.

    Args:
        say: prints one line.

    Raises:
        UserError: config.json cannot be read.
    """
    if config.optim.warmup_start == "zero" or not (out / CONFIG).exists():
        return config
    saved = _read_object(out / CONFIG).get("train")
    if not isinstance(saved, dict) or "warmup_start" in (saved.get("optim") or ()):
        return config
    if read_run_config(out).optim.warmup_start != "zero":
        return config
    say(f"{out} holds a run of an earlier version, whose warm-up began at 0: it keeps --warmup-start zero")
    return replace(config, optim=replace(config.optim, warmup_start="zero"))


def finished_result(config: TrainConfig, out: Path) -> dict[str, Any] | None:
    """result.json of the run of `config` in `out`, if it is finished.

    A run of another number of steps is not: it goes on to that of `config`.

    Raises:
        UserError: the folder holds something else (says what differs), or has taken as many steps already.
    """
    before = _check_same(config, out)
    result = _read_result(out) if (out / RESULT).exists() else None
    if before is not None and before.steps != config.steps:
        _check_steps(config, before, out, result)
        return None
    # A result of fewer steps was left when the run was made longer.
    return result if result is not None and result["steps"] == config.steps else None


def _read_result(out: Path) -> dict[str, Any]:
    result = _read_object(out / RESULT)
    named = (
        ("diverged_at_step",)
        if result.get("diverged")
        else ("terminal_val_loss", "terminal_tune_loss", "seconds")
    )
    for name in ("steps", *named):
        if isinstance(result.get(name), bool) or not isinstance(result.get(name), (int, float)):
            raise UserError(
                f"{out / RESULT} has {result.get(name)!r} as its {name}; expected a number: remove it, and the run is "
                "finished again from its last checkpoint"
            )
    return result


def begin_run(
    config: TrainConfig, out: Path, *, about: dict[str, Any], main: bool, say: Callable[[str], None]
) -> Path | None:
    """Write config.json for a new run, or find the checkpoint from which an unfinished one goes on.

    Args:
        about: what config.json says beside the configuration: versions, hardware, data.
        main: whether this process writes (rank 0 alone).
        say: prints one line.

    Returns:
        The newest whole checkpoint, or None to start from step 0.

    Raises:
        UserError: the data or the number of processes is not what the run began with, so it could not go on
            as it would have; or the checkpoint is of another model.
    """
    if not (out / CONFIG).exists():
        if main:
            write_json_atomic(out / CONFIG, {"train": config.to_dict(), **about})
        return None
    before = _read_object(out / CONFIG)
    steps = before["train"].get("steps", config.steps)
    if before.get("processes", 1) != about["processes"]:
        raise UserError(
            f"{out} was begun with {before.get('processes', 1)} processes and cannot go on with {about['processes']}: "
            f"the data order would change; start as many, or choose another --out"
        )
    check_same_text(out, about["data"])
    checkpoint, skipped = newest_whole(out)
    for reason in skipped:
        say(f"{reason}: passed over")
    if checkpoint is None:
        say(f"{out} holds no whole checkpoint: starting again from step 0")
    else:
        _check_model(config, checkpoint)
        say(f"resuming from {checkpoint}")
    if steps != config.steps:
        done = 0 if checkpoint is None else checkpoint_step(checkpoint)
        say(f"the run of {steps} steps goes on from step {done} by the schedule of {config.steps} steps")
        if main:
            _change_steps(out, before, done, config.steps, about)
    return checkpoint


def _change_steps(
    out: Path, content: dict[str, Any], done: int, steps: int, about: Mapping[str, Any]
) -> None:
    """Record in config.json that the run has another number of steps from now on, with its result until here."""
    change: dict[str, Any] = {"at_step": done, "steps": [content["train"]["steps"], steps]}
    if command := about.get("command"):
        change["command"] = command
    if (out / RESULT).exists():
        change["result"] = _read_object(out / RESULT)
    changes = [*content.get(CHANGES, []), change]
    write_json_atomic(
        out / CONFIG, {**content, "train": {**content["train"], "steps": steps}, CHANGES: changes}
    )
    (out / RESULT).unlink(missing_ok=True)


def changes_of(out: Path) -> list[dict[str, Any]]:
    """When the number of steps of the run in `out` was changed, without the results until then."""
    found = _read_object(out / CONFIG).get(CHANGES, [])
    return [{key: each[key] for key in ("at_step", "steps")} for each in found]


def check_same_text(out: Path, data: Mapping[str, Any]) -> None:
    """Compare the tokens that a run began with to those that there are now.

    Args:
        data: ``TokenData.describe()``.

    Raises:
        UserError: they differ.
    """
    before = _read_object(out / CONFIG).get("data")
    if not isinstance(before, dict) or before.get("content_sha256") != data["content_sha256"]:
        raise UserError(
            f"the text of the run in {out} has changed since it began: restore it, or choose another --out"
        )


def holds_run(folder: Path) -> bool:
    """Whether `folder` is that of a train command, and not of a model."""
    path = folder / CONFIG
    return path.is_file() and isinstance(content := _read_json(path), dict) and "train" in content


def read_configuration(path: Path) -> dict[str, Any]:
    """The object in a configuration's JSON file. Raises UserError: it cannot be read, or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"the configuration {path} holds {type(values).__name__}; expected an object of fields"
        )
    return values


def read_run_config(out: Path) -> TrainConfig:
    """The configuration of the run in `out`.

    Raises:
        UserError: there is no run in that folder, or its config.json cannot be read.
    """
    if not (out / CONFIG).exists():
        raise UserError(f"{out} holds no run (no {CONFIG}): expected the folder of a train command")
    content = _read_object(out / CONFIG)
    if "train" not in content:
        raise UserError(
            f'{out} holds no run (no "train" in its {CONFIG}): expected the folder of a train command'
        )
    return config_from_dict(content["train"])


def _check_steps(config: TrainConfig, before: TrainConfig, out: Path, result: dict[str, Any] | None) -> None:
    """Refuse another number of steps where the run cannot go on to it."""
    if result is not None and result.get("diverged"):
        raise UserError(
            f"the run of {before.steps} steps in {out} diverged at step {result['diverged_at_step']}: choose another "
            f"--out for {config.steps} steps"
        )
    checkpoint, _ = newest_whole(out)
    done = 0 if checkpoint is None else checkpoint_step(checkpoint)
    if done >= config.steps:
        raise UserError(
            f"the run in {out} has taken {done} of its {before.steps} steps, and --steps is {config.steps}: expected "
            f"more than {done} to go on, or {before.steps} to leave the run as it is; or choose another --out"
        )


def _check_same(config: TrainConfig, out: Path) -> TrainConfig | None:
    """Refuse a folder that is not this run's; return the configuration of the run that it holds, whatever its steps."""
    if not (out / CONFIG).exists():
        others = [p.name for p in out.iterdir() if not p.name.startswith(".")] if out.is_dir() else []
        if others:
            raise UserError(f"{out} is not empty ({others[0]}) and holds no run: choose another --out")
        return None
    before = read_run_config(out)
    there, here = identity(before), identity(config)
    for name in {**here, **there}:
        if name != "steps" and there.get(name) != here.get(name):
            raise UserError(
                f"{out} holds a run of another configuration "
                f"({name} is {there.get(name)!r} there and {here.get(name)!r} here): "
                f"choose another --out, or run it as it was"
            )
    return before


def _check_model(config: TrainConfig, checkpoint: Path) -> None:
    saved = _read_object(checkpoint / CONFIG)
    names = {
        "hidden_size": ("hidden_size", "n_embd"),
        "layers": ("num_hidden_layers", "n_layer"),
        "heads": ("num_attention_heads", "n_head"),
        "vocab_size": ("vocab_size",),
    }
    for field, keys in names.items():
        found = next((saved[key] for key in keys if key in saved), None)
        if found != getattr(config.model, field):
            raise UserError(
                f"{checkpoint} is of another model: "
                f"its {field} is {found}, the run's is {getattr(config.model, field)}; "
                f"remove the checkpoint or choose another --out"
            )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove the folder or choose another one") from None


def _read_object(path: Path) -> dict[str, Any]:
    content = _read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds {type(content).__name__}; expected an object: remove the folder or choose another one"
        )
    return content
