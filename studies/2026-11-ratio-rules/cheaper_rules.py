"""Train with ratios from rules that are cheaper than the curvature along the update.

    python studies/2026-11-ratio-rules/cheaper_rules.py --out runs/cousins

On each of SETTINGS a uniform run at 1e-3 is measured every 15 steps by the STATIC rules. A rule's ratios are the
geometric mean along that run, relative to FFN:

    "Adam's second moment"    S_v(b) ** -1/2, S_v the mean of its bias-corrected second moment over the block's elements
    "signal over sharpness"   mean |E g_b| / S(b), E over the 16 batches of 2 048 tokens, S by `fisher` on four of them

The IN_RUN rules move ratios that begin at 1 during the run itself (AutoRatios). Their signal is the cosine between a
gradient and the update before it. Ratios are kept within 0.01 and 100. Each rule is then trained from scratch over LRS
at seed 0 with a warm-up of 15 %, so every rule has the same number of runs.

Writes data/cheaper-rules.json. Runs are cached in --out. Two runs go side by side; on two cores set OMP_NUM_THREADS=1,
or their threads wait for each other.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from blockwise_lr.analysis.measure_slopes import load_optimizer
from blockwise_lr.analysis.named_models import find_named_model
from blockwise_lr.blocks import Block, classify, split_fused
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.files import write_json_atomic
from blockwise_lr.optim.ratios import spell_ratios
from blockwise_lr.sharpness import measure_sharpness
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.run_folder import read_run_config
from blockwise_lr.train.run_sharpness import measure_batches

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from compare_rules import DATA, train_with_checkpoints
from kept_runs import run
from model_settings import config_of

SETTINGS = ("llama-2m", "gpt2-1m")
LRS = (1e-3, 2e-3, 4e-3)
MEASURED_AT = 1e-3
STATIC = ("Adam's second moment", "signal over sharpness")
IN_RUN = {
    "cosine": "auto:begin=uniform,signal=cosine,gain=30",
    "consistency": "auto:begin=uniform",
    "consistency, gain 10": "auto:begin=uniform,gain=10",
}
LOW, HIGH = 0.01, 100.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/cousins"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        static = dict(zip(SETTINGS, pool.map(lambda setting: measured(setting, out), SETTINGS)))
        points = [
            {"setting": setting, "rule": rule, "ratios": ratios, "base_lr": lr}
            for setting in SETTINGS
            for rule, ratios in {**static[setting], **IN_RUN}.items()
            for lr in LRS
        ]
        tried = list(pool.map(lambda point: train(point, out), points))
    about = {"command": " ".join(sys.argv), **describe_environment("cpu")}
    path = DATA / "cheaper-rules.json"
    found = json.loads(path.read_text())
    ours = {point["rule"] for point in points}
    others = [
        each for each in found["tried"] if each["point"]["rule"] not in ours
    ]  # those of rules_during_training.py
    write_json_atomic(path, {**found, **about, "tried": tried + others})


def train(point: dict[str, Any], out: Path) -> dict[str, Any]:
    config = config_of(point["setting"], out)
    optim = replace(config.optim, ratios=point["ratios"], base_lr=point["base_lr"])
    return run(out, replace(config, eval_every=0, optim=optim), point)


def measured(setting: str, out: Path) -> dict[str, str]:
    """Return the ratios by each static rule along a uniform run of the setting: {rule: spelled ratios}."""
    path, folder = out / f"{setting}.json", out / setting
    found = out / f"{setting}-static.json"
    if not found.exists():
        write_json_atomic(path, config_of(setting, out).to_dict())
        train_with_checkpoints(path, folder, MEASURED_AT)
        config = read_run_config(folder)
        context = config.model.context
        data = prepare_data(config.data, vocab_size=config.model.vocab_size, context=context)
        batches = measure_batches(data.measure, context, batches=16, batch_size=config.batch_size)
        along = []
        for step, load in find_named_model(str(folder), seed=0).models:
            model = split_fused(load())
            optimizer = load_optimizer(config, model, folder / f"checkpoint-{step}")
            along.append(static_scores(model, optimizer, batches))
        write_json_atomic(found, {rule: mean_over_ffn([each[rule] for each in along]) for rule in STATIC})
        shutil.rmtree(folder)
    values: dict[str, dict[str, float]] = json.loads(found.read_text())
    return {rule: spell_ratios(ratios) for rule, ratios in values.items()}


def mean_over_ffn(scores: list[dict[Block, float]]) -> dict[str, float]:
    """Return the geometric mean of the scores along the run, each relative to FFN's at the same step."""
    logs = {
        block: float(np.mean([math.log(each[block] / each[Block.FFN]) for each in scores]))
        for block in scores[0]
    }
    return {block.value: float(f"{min(max(math.exp(log), LOW), HIGH):.3g}") for block, log in logs.items()}


def static_scores(
    model: nn.Module, optimizer: Optimizer, batches: list[dict[str, Tensor]]
) -> dict[str, dict[Block, float]]:
    """Return the scores at one step: {rule: {block: score}}. A learning rate is proportional to its score."""
    samples = sum(batch["labels"][:, 1:].numel() for batch in batches) // len(batches)
    moments = measure_sharpness(model, estimator="optimizer", optimizer=optimizer, samples=samples)
    sharpness = measure_sharpness(model, batches[:4])
    signal = mean_gradient_size(model, batches)
    return {
        "Adam's second moment": {block: moments[block].mean ** -0.5 for block in signal},
        "signal over sharpness": {block: signal[block] / sharpness[block].mean for block in signal},
    }


def mean_gradient_size(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[Block, float]:
    """Return mean |E g_b| over the elements of each block, E over the batches."""
    model.zero_grad()
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    blocks, totals, counts = classify(model), defaultdict[Block, float](float), Counter[Block]()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            totals[blocks[name]] += float(parameter.grad.abs().sum())
            counts[blocks[name]] += parameter.numel()
    return {block: total / counts[block] for block, total in totals.items()}


if __name__ == "__main__":
    main()
