"""Measure the ratios along the update during the run itself, and train with them from then on.

    python studies/2026-11-ratio-rules/rules_during_training.py --out runs/in_run

The run begins with uniform ratios. Every 15 steps from step 45 (the end of warm-up) to step 150, three batches of the
measure split give the learning rates that are best for all blocks together, relative to FFN's. They take effect one
step later, by one of two rules:

    "measured in the run, mean"     the log ratios are the mean of all such measurements so far
    "measured in the run, greedy"   each moves the log ratios half way to what it says, by at most log 4 / 2

Seed 0, over the base learning rates of cheaper_rules.py; the runs are added to data/cheaper-rules.json. Two runs go
side by side; on two cores set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from blockwise_lr.blocks import Block
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.directional import measure_directional
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train import run as training
from blockwise_lr.train.config import TrainConfig, config_from_dict
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.run_sharpness import measure_batches

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from cheaper_rules import LRS
from compare_rules import DATA
from joint_rule import joint_ratios
from model_settings import config_of

RULES = {"measured in the run, mean": 0.0, "measured in the run, greedy": 0.5}
SETTINGS = ("llama-2m",)
STEPS = range(45, 151, 15)
LOW, HIGH = 0.1, 20.0
FARTHEST = math.log(4)


class InRun(TrainerCallback):
    """Measures the ratios after each of STEPS and moves the learning rates."""

    def __init__(self, config: TrainConfig, gain: float) -> None:
        context = config.model.context
        data = prepare_data(config.data, vocab_size=config.model.vocab_size, context=context)
        self.batches = measure_batches(data.measure, context, batches=3, batch_size=config.batch_size)
        self.gain, self.seen = gain, list[dict[Block, float]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in STEPS:
            return
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        report = measure_directional(kwargs["model"], optimizer, self.batches)
        logs = {block: math.log(ratio) for block, ratio in joint_ratios([report], LOW, HIGH)[0].items()}
        self.seen.append(logs)
        for group in optimizer.param_groups:
            block, now = Block(group["block"]), math.log(group["lr_ratio"])
            if self.gain:
                log = now + self.gain * max(-FARTHEST, min(FARTHEST, logs[block] - now))
            else:
                log = sum(each[block] for each in self.seen) / len(self.seen)
            group["initial_lr"] *= math.exp(log - now)
            group["lr_ratio"] = math.exp(log)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/in_run"))
    parser.add_argument("--one", nargs=3, metavar=("CONFIG", "RULE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        train(*arguments.one)
        return
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    points = [
        {"setting": setting, "rule": rule, "ratios": "uniform at first", "base_lr": lr}
        for setting in SETTINGS
        for rule in RULES
        for lr in LRS
    ]
    with ThreadPoolExecutor(2) as pool:
        tried = list(pool.map(lambda point: one(point, out), points))
    path = DATA / "cheaper-rules.json"
    found = json.loads(path.read_text())
    others = [each for each in found["tried"] if each["point"]["rule"] not in RULES]
    about = {"command": " ".join(sys.argv), **describe_environment("cpu")}
    write_json_atomic(path, {**found, "tried": others + tried, "in_run": about})


def one(point: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train one run in its own process, or read it if it is finished."""
    config = config_of(point["setting"], out)
    config = replace(
        config, eval_every=0, optim=replace(config.optim, ratios="uniform", base_lr=point["base_lr"])
    )
    folder = out / f"{point['setting']}-{point['rule'].split()[-1]}-{point['base_lr']:g}"
    path = folder.with_name(f"{folder.name}.json")
    if not (folder / "result.json").exists():
        write_json_atomic(path, config.to_dict())
        command = [sys.executable, __file__, "--one", path, point["rule"], folder]
        subprocess.run(list(map(str, command)), check=True)
    result = json.loads((folder / "result.json").read_text())
    losses = {key: result[f"terminal_{key}"] for key in ("tune_loss", "val_loss")}
    print(losses, point, flush=True)
    return {"point": point, "diverged": result.get("diverged", False), **losses}


def train(config: str, rule: str, out: str) -> None:
    read = config_from_dict(json.loads(Path(config).read_text()))
    made = training.make_trainer

    def make_trainer(*args: Any, **kwargs: Any) -> Any:
        trainer = made(*args, **kwargs)
        trainer.add_callback(InRun(read, RULES[rule]))
        return trainer

    training.make_trainer = make_trainer
    training.train(read, Path(out))


if __name__ == "__main__":
    main()
