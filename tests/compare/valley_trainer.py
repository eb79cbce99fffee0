"""synthetic_trainer.py with a loss that is a parabola in log2 of every ratio, whose best ratios are emb=4, vo=0.5."""

import json
import math
import sys
from pathlib import Path

import synthetic_trainer

BEST = {"emb": 4.0, "vo": 0.5}
CURVATURE = {"emb": 0.005, "qk": 0.02, "vo": 0.001, "ffn": 0.01, "norm": 0.0, "head": 0.0}


def valley(step: float, total: int, ratios: str, base_lr: float, warmup: float, seed: int) -> float:
    given = (
        {}
        if ratios == "uniform"
        else {k: float(v) for k, _, v in (p.partition("=") for p in ratios.split(","))}
    )
    rise = sum(c * math.log2(given.get(b, 1.0) / BEST.get(b, 1.0)) ** 2 for b, c in CURVATURE.items())
    return 3.0 + 0.1 * seed + rise * (1 + 0.01 * seed) + 0.05 * math.log(base_lr / 2e-3) ** 2


if __name__ == "__main__":
    synthetic_trainer.loss = valley
    if sys.argv[3:] == ["diverging"]:  # a peak learning rate of QK above 0.3
        text = json.loads(Path(sys.argv[1]).read_text())["optim"]["ratios"]
        pairs = [pair.partition("=") for pair in text.split(",") if "=" in pair]
        synthetic_trainer.RATIOS[text] = {block: float(ratio) for block, _, ratio in pairs}
    sys.exit(synthetic_trainer.write_run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
