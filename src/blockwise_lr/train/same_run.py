"""Is it the same run? Whether a folder's run is finished, and where an unfinished one resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockwise_lr.checkpoints.manifest import checkpoint_step, newest_complete
from blockwise_lr.errors import UserError
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.config import TrainConfig, identity
from blockwise_lr.train.run_folder import (
    CHANGES,
    CONFIG,
    RESULT,
    check_same_text,
    read_object,
    read_run_config,
)
from blockwise_lr.train.run_result import read_result


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
    saved = read_object(out / CONFIG).get("train")
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
    result = read_result(out) if (out / RESULT).exists() else None
    if before is not None and before.steps != config.steps:
        _check_steps(config, before, out, result)
        return None
    # A result with fewer steps is from before the run was extended.
    return result if result is not None and result["steps"] == config.steps else None


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
    before = read_object(out / CONFIG)
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
        change["result"] = read_object(out / RESULT)
    changes = [*content.get(CHANGES, []), change]
    write_json_atomic(
        out / CONFIG, {**content, "train": {**content["train"], "steps": steps}, CHANGES: changes}
    )
    (out / RESULT).unlink(missing_ok=True)


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
    differing = [name for name in {**here, **there} if name != "steps" and there.get(name) != here.get(name)]
    if differing:
        each = "; ".join(
            f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in differing
        )
        # These two have other defaults than in earlier versions, so the same command may differ in them.
        flags = [f"--{flag} {there[name]}" for name, flag in _CHANGED_DEFAULTS.items() if name in differing]
        raise UserError(
            f"{out} holds a run of another configuration ({each}): choose another --out, or run it as it was"
            f"{', with ' if flags else ''}{' '.join(flags)}"
        )
    return before


_CHANGED_DEFAULTS = {"optim.ratios": "ratios", "optim.base_lr": "base-lr"}


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


def _check_model(config: TrainConfig, checkpoint: Path) -> None:
    saved = read_object(checkpoint / CONFIG)
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
