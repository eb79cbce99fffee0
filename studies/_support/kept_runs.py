"""Train the runs of a study in their own processes, and keep finished ones in the repository."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockwise_lr.train.config import TrainConfig, identity


def run(out: Path, config: TrainConfig, point: dict[str, Any]) -> dict[str, Any]:
    """Train `config` on one thread in its own process, or read the run from `out` if it is finished.

    Returns:
        The point, whether the run diverged, and its last losses on tune and val (None if it diverged).

    Raises:
        SystemExit: the run left no result. The message holds the end of what it printed.
    """
    folder = out / name_of(config)
    (out / f"{folder.name}.json").write_text(json.dumps(config.to_dict()))
    if not (folder / "result.json").exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "blockwise_lr", "train", f"{folder}.json", "--out", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not (folder / "result.json").exists():
            raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    result = json.loads((folder / "result.json").read_text())
    losses = {key: result[f"terminal_{key}"] for key in ("tune_loss", "val_loss")}
    print(f"{losses['tune_loss']} {point}", flush=True)
    return {"point": point, "diverged": result.get("diverged", False), **losses}


def call(arguments: Sequence[str]) -> None:
    """Run one command of the library in its own process; exit with its code if it fails."""
    done = subprocess.run([sys.executable, "-m", "blockwise_lr", *arguments])
    if done.returncode:
        raise SystemExit(done.returncode)


def name_of(config: TrainConfig) -> str:
    """The folder of a run. Settings that the library got later do not change it."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:12]


def tune_loss(run: dict[str, Any]) -> float:
    """The loss that chooses between runs; infinite for a diverged run."""
    return float("inf") if run["tune_loss"] is None else float(run["tune_loss"])


KEPT = ("config.json", "metrics.jsonl", "result.json")
"""The files of a finished run that a comparison reads: a few kilobytes."""


@contextmanager
def kept(archive: Path, runs: Path) -> Iterator[None]:
    """Unpack the runs in `archive` into `runs`, and pack all finished runs into `archive` on leaving, also by an error.

    A study therefore continues from a fresh clone, and an added arm is compared with the very same baseline. SIGTERM
    raises KeyboardInterrupt inside the block.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    if archive.exists():
        with tarfile.open(archive) as packed:
            packed.extractall(runs, filter="data")
    try:
        yield
    finally:
        pack(runs, archive)
        signal.signal(signal.SIGTERM, before)


def pack(runs: Path, archive: Path) -> None:
    """Write KEPT of every finished run; the same runs give the same bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_name(f"{archive.name}.tmp")
    with (
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as packed,
    ):
        for path in sorted(result.with_name(name) for result in runs.glob("*/result.json") for name in KEPT):
            about = tarfile.TarInfo(f"{path.parent.name}/{path.name}")
            about.size, about.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                packed.addfile(about, file)
    temporary.replace(archive)
