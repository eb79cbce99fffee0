"""What `--compile` costs before the first step and in each step: the repeated layer compiled, or the whole model.

    python benchmarks/compile_start.py

Each arm is a process of its own with an empty compiler cache. It builds GPT-2 small with split weights and runs
forward and backward on one sequence of 64 tokens. `layers` compiles as `train --compile` does, `whole` is
`torch.compile(model)`, and `eager` compiles nothing. The start is the time from the call of the compiler to the end of
the first backward pass. A step is the median of the following forward and backward passes, in CPU time. The CPU time of
compiling is that of the whole process, with the compiler's own processes, less that of `eager`. CPU time depends less
than time on what else the machine does. Stops if the losses of the arms differ. `--quick` traces graphs and generates
no code for them. Writes results/compile_start-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from _measure import GPT2_SMALL, GPT2_TINY, argument_parser, finish, in_turns, ratio

from blockwise_lr import split_fused
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.compiled_layers import compile_layers

ARMS = ("whole", "layers", "eager")


class Run(NamedTuple):
    start: float  # seconds
    step: float  # seconds of CPU time
    loss: float
    cpu: float = 0.0  # seconds of the whole process


def measured(arm: str, *, tiny: bool, tokens: int, steps: int) -> Run:
    """Run one arm in this process."""
    torch.manual_seed(0)
    shape = GPT2_TINY if tiny else GPT2_SMALL
    model = split_fused(build_model(shape, seed=0)).train()
    ids = torch.randint(shape.vocab_size, (1, tokens))
    steps_seconds = []
    backend = "aot_eager" if tiny else "inductor"
    begin = time.perf_counter()
    if arm == "layers":
        compile_layers(model, backend=backend)
    forward = torch.compile(model, backend=backend) if arm == "whole" else model
    for step in range(1 + steps):
        begin_step = time.process_time()
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        steps_seconds.append(time.process_time() - begin_step)
        if step == 0:
            start = time.perf_counter() - begin
    return Run(start, median(steps_seconds[1:]), loss.item())


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def process(arm: str, arguments: argparse.Namespace) -> Callable[[], Run]:
    """Return a function that runs the arm once in a process of its own, with an empty cache."""

    def run() -> Run:
        with tempfile.TemporaryDirectory() as cache:
            environment = {
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": cache,
                "OMP_NUM_THREADS": str(arguments.threads),
            }
            command = [sys.executable, __file__, "--arm", arm, "--tokens", str(arguments.tokens)]
            command += ["--steps", str(arguments.steps), *(["--quick"] if arguments.quick else [])]
            before = cpu_seconds_of_children()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the arm {arm} failed:\n{done.stderr[-3000:]}")
        run = Run(*json.loads(done.stdout.splitlines()[-1]))
        return run._replace(cpu=cpu_seconds_of_children() - before)

    return run


def main() -> None:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument(
        "--tokens", type=int, default=64, help="length of the sequence (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=10, help="steps after the first (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS (default: %(default)s)")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        run = measured(arguments.arm, tiny=arguments.quick, tokens=arguments.tokens, steps=arguments.steps)
        print(json.dumps(run))
        return
    runs = in_turns({arm: process(arm, arguments) for arm in ARMS}, arguments.repeats)
    losses = [run.loss for each in runs.values() for run in each]
    if max(losses) - min(losses) > 1e-3:
        raise SystemExit(f"the arms did not do the same work: losses {losses}")
    start = {arm: [run.start for run in each] for arm, each in runs.items()}
    step = {arm: [run.step for run in each] for arm, each in runs.items()}
    cpu = {arm: [run.cpu for run in each] for arm, each in runs.items()}
    compiling = {arm: [a - b for a, b in zip(cpu[arm], cpu["eager"])] for arm in ("whole", "layers")}
    finish(
        __file__,
        arguments,
        settings={"tokens": arguments.tokens, "steps": arguments.steps, "threads": arguments.threads},
        measurements={"start, s": start, "step, s of CPU time": step, "process, s of CPU time": cpu},
        ratios=[
            ratio(start, "layers", "whole", what="start"),
            ratio(compiling, "layers", "whole", what="CPU time of compiling", at_most=0.5),
            ratio(step, "layers", "whole", what="step"),
            ratio(step, "layers", "eager", what="step"),
        ],
    )


if __name__ == "__main__":
    main()
