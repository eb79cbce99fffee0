"""Do the ratios of the rule win when a model is trained with them?

    python studies/2026-11-measurement-rule/try_rule.py --text TEXT.jsonl --out runs/rule
    python studies/2026-11-measurement-rule/try_rule.py --list

First a uniform run at a quarter of its rate is measured at 20 points, 4 batches each (data/measured/SHAPE.json). Then
every rule is trained from scratch and tuned alike, on the models, text and settings of the horizon study over 300
steps. A run that has ended is one file in data/runs and is not made again; a run that is cut off goes on from its
checkpoint. --known FOLDER takes over equal runs of the horizon study.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from blockwise_lr import DirectionalReport, measure_directional, param_groups
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.allocator import keep_freed_memory
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.run_sharpness import measure_batches

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from arms import RULES, Arm
from joint_rule import joint_ratios
from other_rules import by_exponent, exponents, signal_to_noise, undamped
from shapes import CONTEXT, LLAMAS, VOCABULARY
from stacked import Stack, Text
from text_runs import load, tokens
from tuning import Results, bracket

STUDY = Path(__file__).parent
STEPS, POINTS = 300, 20
WARMUPS = (0.15, 0.4)
MEASURED_AT = {"llama-600k": 2e-3, "llama-2m": 1.4e-3, "tiny": 2e-3}
"""A quarter of the tuned uniform rate, as the documentation advises."""

CENTRES = {"uniform": 8e-3, "embedding alone": 5.6e-3, "after MoLS": 8e-3, "after LLR": 8e-3}
"""Where the search over base learning rates begins; elsewhere at 2.8e-3."""

ORDER = ("uniform", "the rule", "embedding alone", "measured", "the earlier rule", "after MoLS", "after LLR")
"""The order of the queue; the horizon study trains measured and uniform, too."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="the text of the horizon study; not needed with --list")
    parser.add_argument("--out", type=Path, default=Path("runs/rule"), help="tokens and checkpoints")
    parser.add_argument("--tokens", type=Path, help="the horizon study's --out, whose tokens are used again")
    parser.add_argument("--data", type=Path, default=STUDY / "data", help="where the results go")
    parser.add_argument("--shapes", nargs="*", default=["llama-600k"], choices=sorted(LLAMAS))
    parser.add_argument("--known", type=Path, nargs="*", default=[STUDY.parent / "2026-11-horizon/data/runs"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--runs", type=int, default=10**6, help="end after so many")
    parser.add_argument("--list", action="store_true", help="show the queue and train nothing")
    arguments = parser.parse_args()
    if arguments.list:
        for shape in arguments.shapes:
            for rule, arm in queue(shape, arguments):
                print(rule, arm.name, json.dumps(arm.to_dict()))
        return
    if arguments.text is None:
        parser.error('--text is missing: one {"text": ...} a line')
    torch.set_num_threads(1)
    keep_freed_memory()
    for folder in (arguments.out, arguments.data / "runs", arguments.data / "measured"):
        folder.mkdir(parents=True, exist_ok=True)
    text, about = tokens(arguments.text, arguments.tokens or arguments.out)
    for shape in arguments.shapes:
        if not (found := arguments.data / "measured" / f"{shape}.json").exists():
            write_json_atomic(found, {**measure(shape, text, arguments), "text": about})
    ended = 0
    for shape in arguments.shapes:
        while ended < arguments.runs and (arms := queue(shape, arguments)):
            if any(train(arm, text, about, arguments) for _, arm in arms):
                ended += 1
            else:
                time.sleep(10)  # another process has what is known to be needed


def rules(shape: str, arguments: argparse.Namespace) -> dict[str, Mapping[str, float]]:
    """Return the ratios of every rule for a model, by the name of the rule."""
    measured = json.loads((arguments.data / "measured" / f"{shape}.json").read_text())
    reports = [DirectionalReport.from_dict(each) for each in measured["reports"]]
    rule = DirectionalReport.ratios_of_run(reports)
    return {
        "uniform": RULES["uniform"],
        "measured": RULES["measured"],
        "the rule": {block.value: float(f"{ratio:.3g}") for block, ratio in rule.items()},
        "the earlier rule": {b.value: float(f"{ratio:.3g}") for b, ratio in joint_ratios(reports)[0].items()},
        "embedding alone": {"emb": RULES["measured"]["emb"]},
        "after MoLS": measured["after MoLS"],
        "after LLR": measured["after LLR"],
    }


def results(arguments: argparse.Namespace) -> Results:
    """Return the runs that have ended, here and in the folders of --known."""
    found: dict[str, Any] = {}
    for folder in (*arguments.known, arguments.data / "runs"):
        if folder.is_dir():
            found |= load(folder).runs
    return Results(found)


def wanted(shape: str, arguments: argparse.Namespace, known: Results) -> Iterator[tuple[str, Arm]]:
    """Yield the runs in order: the rates of every rule, then the other warm-up, then two more seeds."""
    chosen: dict[str, Arm] = {}
    firsts = {
        rule: Arm(shape, arguments.steps, CENTRES.get(rule, 2.8e-3), rules(shape, arguments)[rule])
        for rule in ORDER
    }
    for rule, first in firsts.items():
        arms, best = bracket(first, known)
        yield from ((rule, arm) for arm in arms)
        if best is not None:
            chosen[rule] = best
    for rule, best in chosen.items():
        arms = [replace(best, warmup=warmup) for warmup in WARMUPS]
        yield from ((rule, arm) for arm in arms)
        chosen[rule] = known.best(arms) or best
    for seed in (1, 2):
        yield from ((rule, replace(best, seed=seed)) for rule, best in chosen.items())


def queue(shape: str, arguments: argparse.Namespace) -> list[tuple[str, Arm]]:
    """Return what is still to be trained and follows from the results so far; copy known runs to data/runs."""
    known = results(arguments)
    found: dict[str, tuple[str, Arm]] = {}
    for rule, arm in wanted(shape, arguments, known):
        here = arguments.data / "runs" / f"{arm.name}.json"
        if arm.name not in known.runs:
            found.setdefault(arm.name, (rule, arm))
        elif not here.exists():
            for folder in arguments.known:
                if (there := folder / here.name).exists():
                    shutil.copy(there, here)
    return list(found.values())


def measure(shape: str, text: Text, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train uniformly, and measure along the update at POINTS points."""
    torch.manual_seed(0)
    arm = Arm(shape, arguments.steps, MEASURED_AT[shape])
    config = LLAMAS[shape]
    data_config = DataConfig(
        data=str(arguments.text), cache=str((arguments.tokens or arguments.out) / "cache")
    )
    data = prepare_data(
        data_config,
        vocab_size=VOCABULARY,
        context=CONTEXT,
        progress=False,
    )
    batches = measure_batches(data.measure, config.context, batches=4, batch_size=16)
    model = build_model(config, seed=arm.seed)
    groups = param_groups(model, lr=arm.base_lr, ratios="uniform", weight_decay=arm.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=arm.base_lr, betas=(0.9, arm.beta2))
    order = text.order(arm.seed, arm.steps * 16)
    reports, snr, alphas = [], [], []
    for step in range(arm.steps):
        for group in optimizer.param_groups:
            group["lr"] = arm.lr(group["block"], step)
        ids = torch.from_numpy(text.train[order[16 * step : 16 * (step + 1)]].astype(np.int64))
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, arm.steps // POINTS) == 0:
            reports.append(measure_directional(model, optimizer, batches, step=step + 1).to_dict())
            snr.append(signal_to_noise(model, optimizer))
            alphas.append(exponents(model))
            print(f"{shape}: measured at step {step + 1}", flush=True)
    return {
        "arm": arm.to_dict(),
        "reports": reports,
        "signal_to_noise": snr,
        "exponents": alphas,
        "after MoLS": undamped(snr),
        "after LLR": by_exponent(model, alphas),
        **describe_environment("cpu"),
    }


def train(arm: Arm, text: Text, about: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Train one arm to its end and write its result; False: another process has it."""
    try:
        with FileLock(arguments.out / f"{arm.name}.lock", timeout=0):
            if arm.name in results(arguments).runs:
                return True
            (result,) = Stack([arm], text).run(checkpoint=arguments.out / f"{arm.name}.pt", every_seconds=30)
            write_json_atomic(
                arguments.data / "runs" / f"{arm.name}.json",
                {**result, "text": about, **describe_environment("cpu")},
            )
    except Timeout:
        return False
    print(result["tune_loss"], result["val_loss"], result["seconds"], json.dumps(arm.to_dict()), flush=True)
    return True


if __name__ == "__main__":
    main()
