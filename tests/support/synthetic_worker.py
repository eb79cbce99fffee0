"""Not a trainer: answers a search's tasks from a closed-form loss, to test what is around training.

As a script it stands where a worker process stands. It needs nothing but Python. Environment: SYNTHETIC_FAIL (number of
a trial that fails), SYNTHETIC_SECONDS (time a trial takes), SYNTHETIC_EXIT (number of a trial that ends the process).
"""

import json
import math
import os
import random
import sys
import time
from pathlib import Path

BEST = {"base_lr": -7.0, "emb": 2.0, "head": 2.0, "norm": 3.0, "qk": 1.0, "vo": -1.0}
WIDTH = {"base_lr": 0.08, "emb": 0.02, "head": 0.02, "norm": 0.002, "qk": 0.02, "vo": 0.02}


def loss(optim: dict, seed: int) -> float:
    """A valley in the log2 learning rate of every block, deterministic noise, and the same text for a seed."""
    ratios = {} if optim["ratios"] == "uniform" else dict(p.split("=") for p in optim["ratios"].split(","))
    log = {block: math.log2(float(ratio)) for block, ratio in ratios.items()}
    base = math.log2(optim["base_lr"])
    total = 3.0 + WIDTH["base_lr"] * (base - BEST["base_lr"]) ** 2
    for block in ("emb", "head", "norm", "qk", "vo"):
        move = base + log.get(block, 0.0) - BEST["base_lr"] - BEST[block]
        total += WIDTH[block] * move**2
    total += 0.01 * (math.log2(optim["warmup_fraction"]) + 2.5) ** 2
    return total + random.Random(f"{seed}-{optim}").gauss(0, 0.002) + random.Random(seed).gauss(0, 0.02)


def answer(task: dict) -> dict:
    config, folder = task["config"], Path(task["folder"])
    value = loss(config["optim"], config["seed"])
    steps = config["steps"]
    curve = [
        [step, value + 3 * (1 - step / steps)]
        for step in range(config["log_every"], steps + 1, config["log_every"])
    ]
    facts = {
        "train": config,
        "versions": {"synthetic_worker": "1"},
        "git_commit": None,
        "hardware": {"device": "none: SYNTHETIC losses, no training"},
        "data": {"source": "none: SYNTHETIC losses, no text"},
    }
    (folder / "config.json").write_text(json.dumps(facts))
    if config["optim"]["base_lr"] > 0.2:
        return {"status": "diverged", "step": 3, "seconds": 0.1, "curve": curve[:1]}
    if (
        task["best"]
        and task["early_end"]
        and curve[-1][1] - task["best"][-1][1] > task["early_end"]["margin"]
    ):
        return {
            "status": "ended",
            "step": steps // 2,
            "gap": 1.0,
            "seconds": 0.1,
            "curve": curve[: len(curve) // 2],
        }
    return {
        "status": "finished",
        "tune_loss": value,
        "val_loss": value + 0.01,
        "seconds": 0.2,
        "curve": curve,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        number = Path(asked["folder"]).name.lstrip("0")
        time.sleep(float(os.environ.get("SYNTHETIC_SECONDS", "0")))
        if number == os.environ.get("SYNTHETIC_EXIT"):
            print("out of memory", file=sys.stderr)
            sys.exit(9)
        failed = number == os.environ.get("SYNTHETIC_FAIL")
        print(json.dumps({"status": "failed", "message": "no text"} if failed else answer(asked)), flush=True)
