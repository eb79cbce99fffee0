"""Measure the sharpness of every block over training on the embedded text: does the paper's principle hold?

    python studies/2026-11-principle/measure_principle.py run --out runs/principle
    python studies/2026-11-principle/measure_principle.py report --out runs/principle

`run` trains each case with one learning rate for all blocks. The cases are a GPT-2 and a LLaMA of the quickstart's size
(three seeds), the LLaMA for four times the steps, and one with a larger vocabulary (one seed each). It measures at 0,
1, 2, 5, 10, 25, 50 and 100 % of the steps, in fp32: `fisher` on 16 batches of the measure split, `hutchinson` on 4,
`empirical` from the training gradient before clipping, `optimizer` from Adam's second moment, and the theory's
prediction from the norms of the parameters. Every run is a process of one thread, two at a time; finished runs are left
alone. The learning rate (2e-3) is not tuned for these cases.

`report` copies the runs' data to data/, if there are any in --out, and writes the pages and figures from all
that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from blockwise_lr import cosine_schedule, measure_sharpness, param_groups, split_fused
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.presets import get_preset

STUDY = Path(__file__).parent
DATA = STUDY / "data"
FRACTIONS = (0, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)
BASE_LR = 2e-3
SEEDS = {"llama": (0, 1, 2), "gpt2": (0, 1, 2), "llama-long": (0,), "llama-vocab-16k": (0,)}


def case(name: str) -> TrainConfig:
    """The quickstart's settings with the paper's own decay, warm-up and clipping."""
    preset = get_preset("quickstart")
    optim = replace(
        preset.optim,
        ratios="uniform",
        base_lr=BASE_LR,
        weight_decay=0.1,
        warmup_fraction=0.05,
        warmup_start="zero",
        clip=1.0,
    )
    config = replace(preset, steps=600, optim=optim, device="cpu", precision="bf16")
    if name == "gpt2":
        return replace(config, model=replace(config.model, family="gpt2", tied=True))
    if name == "llama-long":
        return replace(config, steps=2400)
    if name == "llama-vocab-16k":
        return replace(config, steps=300, model=replace(config.model, vocab_size=16_384))
    return config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phase", choices=["run", "report"])
    parser.add_argument("--out", type=Path, default=Path("runs/principle"))
    parser.add_argument("--one", nargs=2, metavar=("CASE", "SEED"), help="only this run, in this process")
    parser.add_argument("--steps", type=int, help="other than the case's own, for a trial")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.phase == "report":
        from principle_report import write_report

        for run in arguments.out.glob("*-seed*.json"):
            shutil.copy(run, DATA)
        write_report(STUDY)
    elif arguments.one:
        name, seed = arguments.one
        train_and_measure(name, int(seed), arguments.out, arguments.steps)
    else:
        runs = [(name, seed) for name, seeds in SEEDS.items() for seed in seeds]
        with ThreadPoolExecutor(2) as pool:
            failed = [run for run, code in zip(runs, pool.map(lambda r: spawn(*r, arguments), runs)) if code]
        if failed:
            raise SystemExit(f"these runs failed (their .log says why): {failed}")


def spawn(name: str, seed: int, arguments: argparse.Namespace) -> int:
    """Train one run in a process of one thread, and return its exit code."""
    if (arguments.out / f"{name}-seed{seed}.json").exists():
        return 0
    steps = ["--steps", str(arguments.steps)] if arguments.steps else []
    command = [sys.executable, __file__, "run", "--out", str(arguments.out), "--one", name, str(seed), *steps]
    with (arguments.out / f"{name}-seed{seed}.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode


def train_and_measure(name: str, seed: int, out: Path, steps: int | None) -> None:
    """Train one case with a plain loop, and write {case}-seed{seed}.json when it is done."""
    from blockwise_lr.data.prepare import FixedWindows, TrainingStream, prepare_data
    from blockwise_lr.train.allocator import keep_freed_memory
    from blockwise_lr.train.build_model import build_model
    from blockwise_lr.train.evaluate_loss import evaluate_loss
    from blockwise_lr.train.settings import warmup_steps

    keep_freed_memory()
    config = case(name)
    config = replace(config, steps=steps or config.steps, seed=seed)
    optim, context = config.optim.resolved(), config.model.context
    data = prepare_data(config.data, vocab_size=config.model.vocab_size, context=context, progress=False)
    model = split_fused(build_model(config.model, seed=seed)).train()
    groups = param_groups(model, optim.base_lr, {}, weight_decay=optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    schedule = cosine_schedule(
        optimizer,
        warmup_steps=warmup_steps(config),
        total_steps=config.steps,
        floor=optim.base_lr * optim.floor_fraction,
    )
    measured_on = list(
        islice(DataLoader(FixedWindows(data.measure, context, 0), config.batch_size, drop_last=True), 16)
    )
    samples = config.batch_size * (context - 1)
    at = {round(fraction * config.steps) for fraction in FRACTIONS}
    points: list[dict[str, Any]] = []
    stream = TrainingStream(data.train, context, seed, n_samples=config.steps * config.batch_size)
    loss = None
    for step, batch in enumerate([None, *DataLoader(stream, config.batch_size)]):
        gradients: dict[str, float] = {}
        if batch is not None:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                loss = model(**batch).loss
            loss.backward()
            if step in at:
                gradients = from_gradients(model, samples)
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step in at:
            points.append(
                {
                    **measurements(model, optimizer if step else None, measured_on, samples, step),
                    "empirical": gradients or None,
                    "train_loss": None if loss is None else loss.item(),
                }
            )
            print(step, {k: f"{v[0]:.2e}" for k, v in points[-1]["fisher"]["blocks"].items()}, flush=True)
    val = FixedWindows(data.val, context, config.eval_tokens)
    write_json_atomic(
        out / f"{name}-seed{seed}.json",
        {
            "case": name,
            "seed": seed,
            **describe_environment("cpu"),
            "config": config.to_dict(),
            "samples_per_step": samples,
            "terminal_val_loss": evaluate_loss(model, val, batch_size=config.batch_size),
            "points": points,
        },
    )


def measurements(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    batches: list[dict[str, torch.Tensor]],
    samples: int,
    step: int,
) -> dict[str, Any]:
    """Measure all estimators at one step, and compute the theory's prediction."""
    from blockwise_lr import classify
    from blockwise_lr.sharpness.theory import predicted_by_block, predicted_sharpness

    fisher = measure_sharpness(model, batches, seed=step, step=step, histogram=True)
    hessian = measure_sharpness(model, batches[:4], estimator="hutchinson", seed=step, step=step)
    predicted = predicted_sharpness(model)
    moment = (
        measure_sharpness(model, estimator="optimizer", optimizer=optimizer, samples=samples)
        if optimizer is not None
        else None
    )
    return {
        "step": step,
        "fisher": fisher.to_dict(),
        "hutchinson": {b.value: [e.mean, e.stderr] for b, e in hessian.items()},
        "optimizer": None if moment is None else {b.value: e.mean for b, e in moment.items()},
        "predicted": {b.value: p for b, p in predicted_by_block(fisher, predicted, classify(model)).items()},
        "predicted_per_parameter": predicted,
    }


def from_gradients(model: torch.nn.Module, samples: int) -> dict[str, float]:
    """Return `empirical` from the current training gradient: B ||g_b||^2 / #(b)."""
    from blockwise_lr.sharpness.parameter_parts import ParameterParts

    parts = ParameterParts(model, None, distributed=False)
    sums = parts.sums([p.grad for p in parts.parameters])
    total: dict[str, list[float]] = {}
    for part, value in zip(parts.parts, sums.tolist()):
        entry = total.setdefault(part.block.value, [0.0, 0.0])
        entry[0] += samples * value
        entry[1] += part.numel
    return {block: trace / numel for block, (trace, numel) in total.items()}


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the finished runs in `folder`, ordered by case and seed."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*.json"))]
    return sorted(found, key=lambda run: (list(SEEDS).index(run["case"]), run["seed"]))


if __name__ == "__main__":
    main()
