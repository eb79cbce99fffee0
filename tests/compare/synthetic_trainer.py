"""Not a trainer: writes a run's folder from closed-form loss curves, to test what is around training.

As a script it stands where `blockwise-lr train` stands: synthetic_trainer.py CONFIG.json DIR. It needs
nothing but Python. Environment: SYNTHETIC_FAIL (part of the name of a run that fails), SYNTHETIC_SECONDS
(time a run takes).
"""

import json
import math
import os
import random
import sys
import time
from pathlib import Path

RATIOS = {
    "uniform": {},
    "paper": {"vo": 4, "ffn": 6, "qk": 8, "emb": 10},
    "quickstart": {"emb": 4, "vo": 0.1, "norm": 8, "head": 4},
}
ADVANTAGE = {"uniform": 0.0, "paper": -0.05, "quickstart": 0.12}


def loss(step: float, total: int, ratios: str, base_lr: float, warmup: float, seed: int) -> float:
    """Falls as a power of the step, is higher while the learning rate is, and has a best base LR of 2e-3.

    A uniform learning rate gains by a longer warm-up, others lose by it.
    """
    decay = 0.5 * (1 + math.cos(math.pi * step / total))
    mistuned = 0.08 * math.log(base_lr / 2e-3) ** 2
    noise = random.Random(f"{seed}-{ratios}-{total}").gauss(0, 0.008) + random.Random(seed).gauss(0, 0.02)
    gain = ADVANTAGE.get(ratios, 0.0) * step / total + (0.04 if ratios == "uniform" else -0.04) * warmup
    return 3.2 + 12 * (step + 20) ** -0.45 + 0.25 * decay + mistuned + noise - gain


def write_run(config: dict, folder: Path) -> int:
    """Write the folder of a finished run; the exit code: 3 if it "diverged", which it does at a large LR."""
    folder.mkdir(parents=True, exist_ok=True)
    total, optim, seed = config["steps"], config["optim"], config["seed"]
    ratios = RATIOS.get(optim["ratios"], {})
    warmup, floor = max(1, total // 20), optim["base_lr"] / 20
    diverges_at = total // 2 if optim["base_lr"] * max(ratios.values(), default=1) > 0.3 else None
    rows = []
    for step in range(config["log_every"], total + 1, config["log_every"]):
        if diverges_at and step > diverges_at:
            break
        u = max(0.0, (step - warmup) / (total - warmup))
        shape = 0.5 * (1 + math.cos(math.pi * u))
        lr = {}
        for block in ("norm", "emb", "qk", "vo", "ffn", "head"):
            peak = optim["base_lr"] * ratios.get(block, 1)
            lr[block] = peak * step / warmup if step < warmup else floor + (peak - floor) * shape
        value = loss(step, total, optim["ratios"], optim["base_lr"], optim["warmup_fraction"], seed)
        evaluated = step == total or (config["eval_every"] and step % config["eval_every"] == 0)
        rows.append(
            {
                "step": step,
                "tokens": 2048 * step,
                "train_loss": value + 0.02,
                "val_loss": value if evaluated else None,
                "lr": lr,
                "grad_norm": 1.0,
                "seconds": 0.3 * step,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {
        "train": config,
        "versions": {"synthetic_trainer": "1"},
        "git_commit": None,
        "hardware": {"device": "none: SYNTHETIC loss curves, no training"},
        "data": {"source": "none: SYNTHETIC loss curves, no text"},
    }
    (folder / "config.json").write_text(json.dumps(facts))
    result = {"steps": total, "tokens": 2048 * total, "seconds": 0.3 * total, "finished": True}
    if diverges_at:
        result |= {
            "diverged": True,
            "diverged_at_step": diverges_at,
            "terminal_val_loss": None,
            "terminal_tune_loss": None,
        }
    else:
        final = loss(total, total, optim["ratios"], optim["base_lr"], optim["warmup_fraction"], seed)
        result |= {"terminal_val_loss": final, "terminal_tune_loss": final + 0.01}
    (folder / "result.json").write_text(json.dumps(result))
    return 3 if diverges_at else 0


if __name__ == "__main__":
    target = Path(sys.argv[2])
    failing = os.environ.get("SYNTHETIC_FAIL")
    if failing and failing in target.name:
        print("some progress")
        print("the text is too short: 3 tokens", file=sys.stderr)
        sys.exit(2)
    time.sleep(float(os.environ.get("SYNTHETIC_SECONDS", "0")))
    print("threads", os.environ.get("OMP_NUM_THREADS"))
    sys.exit(write_run(json.loads(Path(sys.argv[1]).read_text()), target))
