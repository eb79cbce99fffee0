"""A run's folder: the names of its files, the run that it holds, and its configuration."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockwise_lr.errors import UserError
from blockwise_lr.train.config import TrainConfig, config_from_dict

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


def changes_of(out: Path) -> list[dict[str, Any]]:
    """Return the changes of the number of steps of the run in `out`, without the results that it had before them."""
    found = read_object(out / CONFIG).get(CHANGES, [])
    return [{key: each[key] for key in ("at_step", "steps")} for each in found]


def check_same_text(out: Path, data: Mapping[str, Any]) -> None:
    """Check that the text is still the one that a run began with.

    Args:
        out: the run's folder.
        data: the result of ``TokenData.describe()`` for the current text.

    Raises:
        UserError: the tokens differ.
    """
    before = read_object(out / CONFIG).get("data")
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
    content = read_object(out / CONFIG)
    if "train" not in content:
        raise UserError(
            f'{out} holds no run (no "train" in its {CONFIG}): expected the folder of a train command'
        )
    return config_from_dict(content["train"])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove the folder or choose another one") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a run.

    Raises:
        UserError: the file cannot be read, or does not hold an object.
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds {type(content).__name__}; expected an object: remove the folder or choose another one"
        )
    return content
