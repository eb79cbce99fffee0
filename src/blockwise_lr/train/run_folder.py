"""A run's folder: which run it holds, whether the run is finished, and where it resumes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockwise_lr.checkpoints.manifest import checkpoint_step, newest_complete
from blockwise_lr.errors import UserError
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.config import TrainConfig, config_from_dict, identity

CONFIG, RESULT = "config.json", "result.json"
CHANGES = "changes"
"""Key in config.json and result.json: the steps at which the run's number of steps was changed, and the new numbers."""


def missing_paths(path: Path) -> list[Path]:
    """Return `path` and those of its parent folders that do not exist yet, innermost first."""
    return [each for each in (path, *path.parents) if not each.exists()]


def remove_created(made: Sequence[Path]) -> None:
    """Remove what a refused run has created, except folders that are not empty.

    Args:
        made: the result of :func:`missing_paths` from before the run.
    """
    for path in made:
        if not path.is_dir():
            path.unlink(missing_ok=True)
            continue
        with contextlib.suppress(OSError):
            path.rmdir()


def keep_original_warmup(config: TrainConfig, out: Path, notify: Callable[[str], None]) -> TrainConfig:
    """Return `config` with the warm-up start of the run in `out`, if an earlier version began that run.

    Such a run's config.json does not name ``warmup_start``. Its warm-up began at 0 and must continue so.

    Args:
        config: the run's configuration.
        out: the run's folder.
        notify: prints one line.

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
    notify(f"{out} holds a run of an earlier version, whose warm-up began at 0: it keeps --warmup-start zero")
    return replace(config, optim=replace(config.optim, warmup_start="zero"))


def finished_result(config: TrainConfig, out: Path) -> dict[str, Any] | None:
    """Return the content of result.json if `out` holds the finished run of `config`; otherwise None.

    A run with another number of steps does not count as finished: it continues to the number of `config`.

    Raises:
        UserError: the folder holds another run (the message says what differs), or its run has already taken at least
            as many steps as `config` has.
    """
    before = _check_same(config, out)
    result = _read_result(out) if (out / RESULT).exists() else None
    if before is not None and before.steps != config.steps:
        _check_steps(config, before, out, result)
        return None
    # A result with fewer steps is from before the run was extended.
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
    config: TrainConfig, out: Path, *, about: dict[str, Any], main: bool, notify: Callable[[str], None]
) -> Path | None:
    """Write config.json for a new run, or find the checkpoint from which an unfinished run resumes.

    Args:
        config: the run's configuration.
        out: the run's folder.
        about: further content of config.json: versions, hardware, data.
        main: whether this process writes, which rank 0 alone does.
        notify: prints one line.

    Returns:
        The newest complete checkpoint, or None to start from step 0.

    Raises:
        UserError: the data or the number of processes has changed since the run began, so that its numbers would
            change; or the checkpoint is of another model.
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
    checkpoint, skipped = newest_complete(out)
    for reason in skipped:
        notify(f"{reason}: passed over")
    if checkpoint is None:
        notify(f"{out} holds no complete checkpoint: starting again from step 0")
    else:
        _check_model(config, checkpoint)
        notify(f"resuming from {checkpoint}")
    if steps != config.steps:
        done = 0 if checkpoint is None else checkpoint_step(checkpoint)
        notify(f"the run of {steps} steps goes on from step {done} by the schedule of {config.steps} steps")
        if main:
            _change_steps(out, before, done, config.steps, about)
    return checkpoint


def _change_steps(
    out: Path, content: dict[str, Any], done: int, steps: int, about: Mapping[str, Any]
) -> None:
    """Record in config.json that the run's number of steps has changed, with the result that it had before."""
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
    """Return the changes of the number of steps of the run in `out`, without the results that it had before them."""
    found = _read_object(out / CONFIG).get(CHANGES, [])
    return [{key: each[key] for key in ("at_step", "steps")} for each in found]


def check_same_text(out: Path, data: Mapping[str, Any]) -> None:
    """Check that the text is still the one that a run began with.

    Args:
        out: the run's folder.
        data: the result of ``TokenData.describe()`` for the current text.

    Raises:
        UserError: the tokens differ.
    """
    before = _read_object(out / CONFIG).get("data")
    if not isinstance(before, dict) or before.get("content_sha256") != data["content_sha256"]:
        raise UserError(
            f"the text of the run in {out} has changed since it began: restore it, or choose another --out"
        )


def holds_run(folder: Path) -> bool:
    """Return whether `folder` is the folder of a run, and not of a model."""
    path = folder / CONFIG
    return path.is_file() and isinstance(content := _read_json(path), dict) and "train" in content


def read_configuration(path: Path) -> dict[str, Any]:
    """Return the object in a configuration's JSON file.

    Raises:
        UserError: the file cannot be read, or does not hold an object.
    """
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
    """Return the configuration of the run in `out`.

    Raises:
        UserError: the folder holds no run, or its config.json cannot be read.
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
    """Check that a run can continue to another number of steps."""
    if result is not None and result.get("diverged"):
        raise UserError(
            f"the run of {before.steps} steps in {out} diverged at step {result['diverged_at_step']}: choose another "
            f"--out for {config.steps} steps"
        )
    checkpoint, _ = newest_complete(out)
    done = 0 if checkpoint is None else checkpoint_step(checkpoint)
    if done >= config.steps:
        raise UserError(
            f"the run in {out} has taken {done} of its {before.steps} steps, and --steps is {config.steps}: expected "
            f"more than {done} to go on, or {before.steps} to leave the run as it is; or choose another --out"
        )


def _check_same(config: TrainConfig, out: Path) -> TrainConfig | None:
    """Check that a folder is empty or holds this run, up to the number of steps.

    Returns:
        The configuration of the run in the folder; None if the folder is empty.
    """
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
