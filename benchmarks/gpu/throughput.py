"""Tokens/s and the share of the card's peak (MFU) of `blockwise-lr train` and of a bare loop on its compiled model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.utils
from _measure import GPT2_TINY, Ratio, synchronize

from blockwise_lr import cosine_schedule, param_groups
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import TrainingStream, prepare_data
from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.train import run as train_run
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.presets import get_preset
from blockwise_lr.train.settings import resolve_precision
from gpu.run_parts import Task

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bf16 operations a second, by the makers' data sheets."""
WARM_UP = 2
"""Lines of the log that are left out: the first steps compile."""


def measure(task: Task) -> None:
    """Train GPT-2 small by `train`, then take its compiled model into a bare loop; write after each.

    Raises:
        SystemExit: the loop compiled the model again.
    """
    config = configuration(task)
    trainers: list[Any] = []

    def kept(*arguments: Any, **named: Any) -> Any:
        trainers.append(make_trainer(*arguments, **named))
        return trainers[-1]

    make_trainer = train_run.make_trainer
    begin, graphs_before = time.perf_counter(), compiled_graphs()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(train_run, "make_trainer", kept),
        without_code_generation() if task.tiny else nullcontext(),
    ):
        train_run.train(config, Path(folder) / "run")
        rows = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    times = [after["seconds"] - before["seconds"] for before, after in pairwise(rows[WARM_UP:-1])]
    add(task, config, {"train": speeds(config, times)}, first_step_seconds=rows[0]["seconds"])
    task.record.add(train_seconds=round(time.perf_counter() - begin, 1))
    (trainer,) = trainers
    graphs = compiled_graphs()
    times = bare_loop(config, trainer.model_wrapped, trainer.model)
    speed = {**task.record.values["measurements"]["tokens/s"], "bare": speeds(config, times)}
    again = compiled_graphs() - graphs
    add(task, config, speed, graphs={"train": graphs - graphs_before, "bare": again})
    if again:
        raise SystemExit(f"the bare loop compiled {again} graphs again: its speed has the compiling in it")


def configuration(task: Task) -> TrainConfig:
    """Return the run: 16 windows of 1 024 tokens a step, in bf16, compiled."""
    made = replace(
        get_preset("gpt2-small"),
        device=task.device,
        steps=12 if task.tiny else 80,
        log_every=2 if task.tiny else 10,
        batch_size=16,
        accumulation=1,
        eval_every=0,
        save_every=0,
        eval_tokens=4096,
        compile=True,
        report_to="none",
        data=DataConfig(data=str(task.data)),
    )
    if task.tiny:
        shape = replace(GPT2_TINY, context=32)
        return replace(made, model=shape, batch_size=2, eval_tokens=128)
    return made


@fp32_precision("ieee")  # as `train` does; another setting would compile the model again
def bare_loop(config: TrainConfig, forward: torch.nn.Module, model: torch.nn.Module) -> list[float]:
    """Return the seconds of each `log_every` steps of a loop like nanoGPT's, after the first two.

    Args:
        config: the run that `train` has done.
        forward: its model as it was compiled.
        model: the model itself, for its parameters.
    """
    optim, device = config.optim.resolved(), config.device
    data = prepare_data(config.data, vocab_size=config.model.vocab_size, context=config.model.context)
    stream = TrainingStream(
        data.train, config.model.context, config.seed, n_samples=config.steps * config.batch_size
    )
    groups = param_groups(model, optim.base_lr, optim.ratios, weight_decay=optim.weight_decay)
    optimizer = torch.optim.AdamW(
        groups, lr=optim.base_lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )
    schedule = cosine_schedule(
        optimizer, warmup_steps=1, total_steps=config.steps, floor=optim.base_lr * optim.floor_fraction
    )
    forward.train()
    half = resolve_precision(config.precision, device) == "bf16"
    times = []
    for first in range(0, config.steps, config.log_every):
        begin = time.perf_counter()
        for step in range(first, first + config.log_every):
            samples = range(step * config.batch_size, (step + 1) * config.batch_size)
            ids = torch.stack([stream[i]["input_ids"] for i in samples]).to(device)
            # Without the cache, as in `train`: with it the model would be compiled again.
            with torch.autocast(device, torch.bfloat16, cache_enabled=False) if half else nullcontext():
                # Two tensors, as Trainer has them: one and the same would compile the model again.
                loss = forward(input_ids=ids, labels=ids.clone()).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        synchronize()
        times.append(time.perf_counter() - begin)
    return times[WARM_UP:]


@contextmanager
def without_code_generation() -> Iterator[None]:
    """Let torch.compile trace the model and run the graph as it is, which takes seconds on a CPU."""
    real = torch.compile

    def traced(model: Any = None, **settings: Any) -> Any:
        return real(model, **{**settings, "backend": "eager", "mode": None, "options": None})

    with patch.object(torch, "compile", traced):
        yield


def compiled_graphs() -> int:
    """Return the number of graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def speeds(config: TrainConfig, seconds: list[float]) -> list[float]:
    """Return tokens a second of each interval between two lines of the log."""
    return [config.log_every * config.batch_size * config.model.context / each for each in seconds]


def add(task: Task, config: TrainConfig, speed: dict[str, list[float]], **values: Any) -> None:
    """Write speeds, and their share of the card's peak where that is known."""
    from blockwise_lr.train.build_model import count_parameters

    model = config.model
    per_token = 6 * count_parameters(model) + 12 * model.layers * model.hidden_size * model.context
    peak = next((found for name, found in PEAK.items() if name in task.record.values["card"]), None)
    measurements: dict[str, Any] = {"tokens/s": speed}
    if peak:
        measurements["MFU"] = {
            name: [value * per_token / peak for value in found] for name, found in speed.items()
        }
    ratios = []
    if "bare" in speed:
        quotient = median(speed["train"]) / median(speed["bare"])
        ratios.append(Ratio("tokens/s: train / bare", [quotient], at_least=1.0))
    settings = {"config": config.to_dict(), "flops_per_token": per_token, "peak": peak}
    task.record.add(settings=settings, measurements=measurements, ratios=ratios, **values)
