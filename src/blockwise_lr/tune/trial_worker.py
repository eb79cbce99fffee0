"""A process that trains one trial after another: `python -m blockwise_lr.tune.trial_worker`.

It reads one task as a line of JSON from stdin and writes one answer as a line of JSON to stdout, until stdin is closed.
Everything that is printed meanwhile goes to stderr. Importing the trainer takes seconds, which a process for each trial
would take again.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from blockwise_lr.errors import NonFiniteLossError, Terminated, UserError
from blockwise_lr.tune.early_end import EarlyEnd

_TERMINATED = 128 + signal.SIGTERM


def main() -> None:
    """Serve tasks until stdin is closed or SIGTERM is received. Ctrl-C is left to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    for line in sys.stdin:
        _answer(answers, run_trial(json.loads(line)))


def run_trial(task: Mapping[str, Any]) -> dict[str, Any]:
    """Train one trial, and return how it ended.

    Args:
        task: "config" and "folder" of the run; "best", the training loss by step of the best finished run as pairs;
            "early_end", the settings of the rule, or None.

    Returns:
        "status" and what a TrialRecord holds of it; for status "failed", the "message" of the error.
    """
    from blockwise_lr.train.config import config_from_dict
    from blockwise_lr.train.metrics import read_metrics
    from blockwise_lr.train.run import train
    from blockwise_lr.tune.trial_callback import EndIfLost, TrialEnded

    folder = Path(task["folder"])
    config = config_from_dict(task["config"])
    rule = None if task["early_end"] is None else EarlyEnd(**task["early_end"])
    watch, last = None, []
    if rule is not None and task["best"]:
        best = {int(step): float(loss) for step, loss in task["best"]}
        watch = EndIfLost(rule, best, folder / "metrics.jsonl")
    try:
        result = train(config, folder, command="blockwise-lr tune", callbacks=[watch] if watch else [])
        answer: dict[str, Any] = {
            "status": "finished",
            "tune_loss": result["terminal_tune_loss"],
            "val_loss": result["terminal_val_loss"],
        }
    except TrialEnded as ended:
        answer = {"status": "ended", "step": ended.step, "gap": ended.gap}
        last = [[ended.step, ended.loss]]
    except NonFiniteLossError as error:
        answer = {"status": "diverged", "step": error.step}
    except Terminated:
        raise SystemExit(_TERMINATED) from None
    except UserError as error:
        return {"status": "failed", "message": str(error)}
    rows = read_metrics(folder / "metrics.jsonl")
    curve = [[r["step"], r["train_loss"]] for r in rows if _is_finite(r["train_loss"])]
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    gc.collect()  # a trainer refers to itself, so its model would stay in memory
    return {**answer, "seconds": rows[-1]["seconds"] if rows else 0.0, "curve": curve + last}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _answer(stream: TextIO, answer: Mapping[str, Any]) -> None:
    stream.write(json.dumps(answer, allow_nan=False) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
