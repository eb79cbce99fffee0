"""Sealed checkpoints: a manifest with checksums, written last, tells a complete checkpoint from an interrupted save."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from blockwise_lr.errors import UserError
from blockwise_lr.files import reading, sha256_of, write_json_atomic

MANIFEST = "manifest.json"
LAYOUT = "sharded.json"
"""The file in a sharded checkpoint that describes its groups."""


def seal(checkpoint: Path) -> None:
    """Seal a complete checkpoint: flush its files to disk, then write the manifest with their sizes and SHA-256 sums.

    Args:
        checkpoint: the folder, named ``checkpoint-STEP``.
    """
    files = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        files[path.relative_to(checkpoint).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
    write_json_atomic(checkpoint / MANIFEST, {"step": checkpoint_step(checkpoint), "files": files})


def problem_with(checkpoint: Path) -> str | None:
    """Return why a checkpoint is not complete; None if every file in the manifest has its size and checksum."""
    name = MANIFEST
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        if not files:
            return f"{MANIFEST} lists no files"
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} does not have the checksum it was saved with"
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so saving it was interrupted"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    return None


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, complete or not, sorted by step."""
    found = [p for p in run.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step at which a checkpoint was saved, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_complete(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint of a run, or None, and why each newer one was skipped."""
    skipped: list[str] = []
    for checkpoint in reversed(checkpoints(run)):
        problem = problem_with(checkpoint)
        if problem is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} is not complete ({problem})")
    return None, skipped


def no_complete_checkpoint(run: Path, skipped: Sequence[str]) -> UserError:
    """Return the error for a run without a complete checkpoint.

    Args:
        run: the run's folder.
        skipped: why each of its checkpoints is not complete.
    """
    reasons = "".join(f"; {reason}" for reason in skipped)
    return UserError(
        f"no complete checkpoint in {run}{reasons}: expected a run that has saved one; train it further, or choose "
        "another"
    )


def rotate(run: Path, keep: int, *, newest: Path) -> None:
    """Delete all checkpoints of a run except the last `keep` sealed ones up to `newest`.

    Later checkpoints are deleted too. The run resumed from an earlier step because they were damaged, and counting
    them would delete complete ones.

    Args:
        run: the run's folder.
        keep: number of checkpoints to keep; at least one is kept.
        newest: the checkpoint that was just sealed, and so is known to be complete.
    """
    last = checkpoint_step(newest)
    sealed = [p for p in checkpoints(run) if (p / MANIFEST).exists() and checkpoint_step(p) <= last]
    for checkpoint in checkpoints(run):
        if checkpoint not in sealed[-max(keep, 1) :]:
            remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first, so that an interrupted deletion does not leave a sealed folder.

    Of a link, only the link is deleted. The folder that it leads to is kept as it is.
    """
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint to load: `path` itself, or the newest complete checkpoint if `path` is a run.

    Args:
        path: the folder of a run, or one of its checkpoints.

    Raises:
        UserError: there is no such folder, it cannot be read, or it has no complete checkpoint.
    """
    with reading(path):
        return _find_checkpoint(path)


def _find_checkpoint(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(
            f"no folder {path}: expected a run's folder (train --out) or one of its checkpoint-* folders"
        )
    # The full path is needed because the folder may be given as "." or by a link.
    named = path.resolve().name.startswith("checkpoint-")
    if named and (path / "config.json").exists() and not checkpoints(path):
        problem = problem_with(path)
        if problem:
            raise UserError(
                f"{path} is not a complete checkpoint: {problem}; choose another checkpoint of the run"
            )
        return path
    newest, skipped = newest_complete(path)
    if newest is None:
        raise no_complete_checkpoint(path, skipped)
    return newest
