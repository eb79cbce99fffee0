"""Tokens/s of `blockwise-lr train` against nanoGPT's loop on the quickstart model, with and without torch.compile.

    python benchmarks/train_throughput.py

Each arm is a process of its own with the same OMP_NUM_THREADS, in turns. `train` is the command itself, with
evaluation and checkpoint at the end only. `bare` is a loop of a dozen lines below, nanoGPT's: batches stacked from
the memory-mapped tokens, autocast, backward, clipping, fused step, schedule; nothing is logged or saved. Model,
optimizer groups and batches are the same. `bare, memory kept` is the same loop with the setting of glibc's malloc
that `train` makes (train/allocator.py), and so is `bare, compiled`. Tokens/s are those of the median interval
between two lines of metrics.jsonl, so without start-up, compilation, evaluation, checkpoint and what else the machine
did for a moment; the seconds of the whole process, which have them all for `train`, and its peak memory are reported
too. With --quick, nothing is compiled. Stops if the training losses of arms that are compiled alike differ, since then
the work was not the same. Writes results/train_throughput-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from _measure import argument_parser, finish, in_turns, ratio

from blockwise_lr import cosine_schedule, param_groups, split_fused
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import TrainingStream, prepare_data
from blockwise_lr.optimizers.registry import optimizer_class
from blockwise_lr.train.allocator import keep_freed_memory
from blockwise_lr.train.config import ModelConfig, TrainConfig, config_from_dict
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.presets import get_preset
from blockwise_lr.train.ratio_text import parse_ratios
from blockwise_lr.train.settings import resolve_precision

EAGER = ("train", "bare", "bare, memory kept")
COMPILED = ("train, compiled", "bare, compiled")


class Run(NamedTuple):
    tokens_per_second: float
    wall_seconds: float
    peak_memory: float  # MB
    loss: float


def quickstart(steps: int) -> TrainConfig:
    return replace(get_preset("quickstart"), device="cpu", steps=steps, eval_every=0, save_every=0)


def tiny(folder: Path) -> TrainConfig:
    """A run of a second, on a text that needs no preparation to speak of."""
    (folder / "text").mkdir(exist_ok=True)
    for i in range(32):
        (folder / "text" / f"{i:02}.txt").write_text("the state of the union " * (60 + i))
    return replace(
        quickstart(steps=8),
        batch_size=4,
        log_every=2,
        model=ModelConfig(hidden_size=16, layers=1, heads=2, vocab_size=280, context=16),
        data=DataConfig(data=str(folder / "text"), cache=str(folder / "cache")),
    )


def bare_loop(config: TrainConfig) -> list[dict[str, Any]]:
    """The rows that `train` would log (step, seconds, train_loss), from a loop with nothing else in it."""
    from transformers import PreTrainedModel

    from blockwise_lr.train.build_model import build_model
    from blockwise_lr.train.settings import warmup_steps

    optim, context = config.optim.resolved(), config.model.context
    data = prepare_data(config.data, vocab_size=config.model.vocab_size, context=context, progress=False)
    stream = TrainingStream(data.train, context, config.seed, n_samples=config.steps * config.batch_size)
    device = "cuda" if config.device == "cuda" else "cpu"
    model: PreTrainedModel = split_fused(build_model(config.model, seed=config.seed)).train().to(device)
    forward = torch.compile(model) if config.compile else model
    groups = param_groups(model, optim.base_lr, parse_ratios(optim.ratios), weight_decay=optim.weight_decay)
    cls, kwargs = optimizer_class(optim.optimizer, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)
    optimizer = cls(groups, **kwargs)
    floor = optim.base_lr * optim.floor_fraction
    schedule = cosine_schedule(
        optimizer, warmup_steps=warmup_steps(config), total_steps=config.steps, floor=floor
    )

    half = resolve_precision(config.precision, device) == "bf16"
    rows, total, begin = [], torch.zeros((), device=device), time.perf_counter()
    for step in range(1, config.steps + 1):
        samples = range((step - 1) * config.batch_size, step * config.batch_size)
        ids = torch.stack([stream[i]["input_ids"] for i in samples]).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach()
        if step % config.log_every == 0:
            mean = total.item() / config.log_every
            rows.append({"step": step, "seconds": time.perf_counter() - begin, "train_loss": mean})
            total.zero_()
    return rows


def process(arm: str, config: TrainConfig, folder: Path, threads: int) -> Callable[[], Run]:
    """A function that runs the arm once in a process of its own."""
    loop, _, variant = arm.partition(", ")
    config_file = folder / f"config {variant}.json"
    config_file.write_text(json.dumps(replace(config, compile=variant == "compiled").to_dict()))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def run() -> Run:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            rows_file, log_file = Path(out) / "run" / "metrics.jsonl", Path(out) / "log"
            if loop == "train":
                command = ["-m", "blockwise_lr", "train", str(config_file), "--out", str(rows_file.parent)]
            else:
                kept = ["--keep-freed-memory"] if variant else []
                command = [__file__, "--bare", str(config_file), str(rows_file), *kept]
            begin = time.perf_counter()
            with log_file.open("w") as log:
                started = subprocess.Popen(
                    [sys.executable, *command], env=environment, stdout=log, stderr=subprocess.STDOUT
                )
                _, status, usage = os.wait4(started.pid, 0)
            wall = time.perf_counter() - begin
            if status:
                raise SystemExit(f"the arm {arm} failed:\n{log_file.read_text()[-3000:]}")
            rows = read_metrics(rows_file)
        seconds = [after["seconds"] - before["seconds"] for before, after in pairwise(rows)]
        tokens = config.log_every * config.batch_size * config.model.context
        return Run(tokens / median(seconds), wall, usage.ru_maxrss / 1024, rows[-1]["train_loss"])

    return run


def main() -> None:
    parser = argument_parser(__doc__, repeats=9)
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps a run (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=2, help="OMP_NUM_THREADS of both arms (default: %(default)s)"
    )
    parser.add_argument("--bare", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep-freed-memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        if arguments.keep_freed_memory and not keep_freed_memory():
            raise SystemExit("malloc's setting was refused: is this glibc?")
        config_file, rows_file = arguments.bare
        rows = bare_loop(config_from_dict(json.loads(config_file.read_text())))
        rows_file.parent.mkdir()
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return

    torch.set_num_threads(arguments.threads)  # of no effect here, but the result file says it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tiny(folder) if arguments.quick else quickstart(arguments.steps)
        prepare_data(config.data, vocab_size=config.model.vocab_size, context=config.model.context)
        compared = (EAGER,) if arguments.quick else (EAGER, COMPILED)  # compile_start.py compiles quickly
        arms = {arm: process(arm, config, folder, arguments.threads) for group in compared for arm in group}
        runs = in_turns(arms, arguments.repeats)
    # Compiled, the same arm differs by some 0.004 from one process to the next.
    for alike, most in zip(compared, (1e-4, 0.02)):
        losses = [run.loss for arm in alike for run in runs[arm]]
        if max(losses) - min(losses) > most:
            raise SystemExit(f"{', '.join(alike)} did not do the same work: last training losses {losses}")
    speed = {arm: [run.tokens_per_second for run in measured] for arm, measured in runs.items()}
    memory = {arm: [run.peak_memory for run in measured] for arm, measured in runs.items()}
    wall = {arm: [run.wall_seconds for run in measured] for arm, measured in runs.items()}
    compiled = (
        [
            ratio(speed, "train, compiled", "bare, compiled", what="tokens/s", at_least=1.0),
            ratio(speed, "train, compiled", "train", what="tokens/s"),
        ]
        if COMPILED in compared
        else []
    )
    finish(
        __file__,
        arguments,
        settings={
            "steps": config.steps,
            "threads": arguments.threads,
            "last_train_loss": {arm: measured[-1].loss for arm, measured in runs.items()},
            "config": {
                **config.to_dict(),
                "data": {"data": config.data.data if not arguments.quick else "words"},
            },
        },
        measurements={"steady state, tokens/s": speed, "whole process, s": wall, "peak memory, MB": memory},
        ratios=[
            ratio(speed, "train", "bare", what="tokens/s", at_least=1.0),
            ratio(speed, "train", "bare, memory kept", what="tokens/s", at_least=1.0),
            *compiled,
            ratio(memory, "train", "bare", what="peak memory"),
            ratio(wall, "train", "bare", what="whole process"),
        ],
    )


if __name__ == "__main__":
    main()
