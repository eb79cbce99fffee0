"""How long many training runs take, from a few measured steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from blockwise_lr.compare.comparison_progress import format_seconds
from blockwise_lr.train.build_model import build_model, count_parameters
from blockwise_lr.train.config import TrainConfig

_START_SECONDS = 10.0  # imports of a process
MEASURED_BELOW = 10_000_000
"""Parameters up to which :func:`estimate` measures a step; it takes too long in a larger model."""
_TRIAL_SECONDS = 2.0  # building, evaluating and saving


def seconds_per_step(
    config: TrainConfig,
    *,
    steps: int = 3,
    threads: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the duration of one optimizer step on random tokens, measured here and now.

    Args:
        config: the run of a trial.
        steps: number of steps to measure, after one that is not counted.
        threads: number of CPU threads, that of one worker.
        clock: what to measure. `time.process_time` counts the time of this process on a core, so that other processes
            on the machine do not matter.
    """
    device = torch.device("cuda" if config.device == "cuda" else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model: torch.nn.Module = build_model(config.model, seed=0)
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        shape = (config.batch_size, config.model.context)
        ids = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
        started = 0.0
        for step in range(steps + 1):
            if step == 1:
                _wait(device)
                started = clock()
            for _ in range(config.accumulation):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        _wait(device)
        return (clock() - started) / steps
    finally:
        torch.set_num_threads(before)


def search_seconds(per_step: float, *, steps: int, runs: int, workers: int) -> float:
    """Return the expected duration of `runs` runs, without early ends.

    Example:
        >>> search_seconds(0.1, steps=300, runs=40, workers=2)
        650.0
    """
    return _START_SECONDS + math.ceil(runs / workers) * (per_step * steps + _TRIAL_SECONDS)


def estimate(config: TrainConfig, *, arms: int, runs: int, done: int, jobs: int) -> str:
    """Return a line with the number of runs, and for small models on the CPU also with their duration.

    Args:
        config: the configuration of a run.
        arms: number of arms.
        runs: number of runs in all.
        done: number of runs that are finished already.
        jobs: number of runs in parallel, one thread each.
    """
    left = max(0, runs - done)
    line = f"{arms} arms, {runs} runs of {config.steps:,} steps" + (f", {left} of them left" if done else "")
    if not left or config.device == "cuda" or count_parameters(config.model) > MEASURED_BELOW:
        return f"{line}."
    seconds = (
        seconds_per_step(config, clock=time.process_time) * config.steps + _START_SECONDS + _TRIAL_SECONDS
    )
    together = format_seconds(math.ceil(left / jobs) * seconds)
    with_jobs = f", {together} with {jobs} jobs" if jobs > 1 else ""
    return f"{line}: about {format_seconds(left * seconds)} on one idle core{with_jobs}."


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
