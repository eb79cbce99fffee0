"""One training run in a process of its own, cached: what the studies over many runs share."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from blockwise_lr.pretrain.config import TrainConfig


def run(out: Path, config: TrainConfig, point: dict[str, Any]) -> dict[str, Any]:
    """Train `config` on one thread; a finished run is read from `out`.

    Returns:
        The point, whether the run diverged, and its last losses on tune and val (None if it diverged).

    Raises:
        SystemExit: the run left no result; the end of its messages.
    """
    text = json.dumps(config.to_dict(), sort_keys=True)
    folder = out / hashlib.sha256(text.encode()).hexdigest()[:12]
    (out / f"{folder.name}.json").write_text(text)
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


def tune_loss(run: dict[str, Any]) -> float:
    """What runs are chosen by; a diverged one is never chosen."""
    return float("inf") if run["tune_loss"] is None else float(run["tune_loss"])
