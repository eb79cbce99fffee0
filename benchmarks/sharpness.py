"""What the sharpness of a block costs at equal standard error: `fisher` against `hutchinson` and other libraries.

    python benchmarks/sharpness.py                    # about a quarter of an hour on two cores
    python benchmarks/sharpness.py --shape 6x384      # larger

A GPT-2 (split, so that blocks are sets of parameters) is trained for some steps on the embedded text; then the trace
of every block's curvature on one fixed batch is estimated with each of these, in turns:

    fisher                                  Gauss-Newton    all blocks at once
    hutchinson (double backward pass)       Hessian         all blocks at once
    hutchinson, differences (finite ones)   Hessian         all blocks at once
    curvlinops GGN hutchinson               Gauss-Newton    one block: GGNLinearOperator, hutchinson_trace
    curvlinops GGN hutch++, xtrace          Gauss-Newton    one block: hutchpp_trace, xtrace
    curvlinops Hessian hutchinson           Hessian         one block: HessianLinearOperator
    eigenthings GGN hutchinson, hutch++     Gauss-Newton    one block: hessian_eigenthings.GGNOperator, trace
    eigenthings Hessian hutchinson          Hessian         one block: hessian_eigenthings.HessianOperator

A draw is what yields one independent estimate: for hutch++ and xtrace a run of 6 products with the matrix, for the
others one product, or one backward pass. With draws of variance V that take T seconds, a standard error of 5 % of the
block's Gauss-Newton trace (the mean of fisher's draws) takes

    T V / (0.05 trace)^2 seconds,

and this is compared (`time`); that there is no half draw is left aside. All blocks: the slowest of them where one
draw serves all, otherwise their sum. The values of a ratio are bootstrap resamples of the draws. Where two methods
estimate the same matrix, `agreement` is the difference of their means in standard errors. hutch++ and xtrace are run
on the feed-forward block only, since they are slow. `memory` is the peak above the model at rest, each method in a
process of its own, the libraries' on the feed-forward block. Writes results/sharpness-<date>.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

import numpy as np
import torch
from _curvature import MATVECS, Draw, Method, Subject, ours, theirs, trained
from _measure import GPT2_SMALL, GPT2_TINY, Ratio, argument_parser, finish, in_turns, ratio

from blockwise_lr import Block, classify, split_fused
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig

SHAPES = {
    "tiny": replace(GPT2_TINY, context=32),
    "4x256": ModelConfig("gpt2", 256, 4, 4, vocab_size=3072, context=128, tied=True),
    "6x384": ModelConfig("gpt2", 384, 6, 6, vocab_size=8192, context=256, tied=True),
    "gpt2-small": replace(GPT2_SMALL, context=256),
}
ERROR, RESAMPLES, ONE_BLOCK = 0.05, 40, Block.FFN
REFERENCE = "forward and backward"
RESET_PEAK = Path("/proc/self/clear_refs")


def equal_error(subject: Subject, draws: int) -> tuple[dict[str, dict[str, list[float]]], list[Ratio]]:
    """What is measured, and the ratios of it."""
    kinds = {**ours(subject), **theirs(subject, ONE_BLOCK, slow=True)}
    made: dict[tuple[Block, str], list[Draw]] = {}
    for name, runs in drawn(ours(subject), draws).items():
        made |= {(block, name): runs for block in subject.present}
    for block in subject.present:
        print(f"{block.value}: other libraries", file=sys.stderr, flush=True)
        runs_by_name = drawn(theirs(subject, block, slow=block is ONE_BLOCK), draws)
        made |= {(block, name): runs for name, runs in runs_by_name.items()}
    made = {key: made[key] for block in subject.present for key in made if key[0] is block}
    traces = {(block, name): [draw.traces[block] for draw in runs] for (block, name), runs in made.items()}
    scale = {block: fmean(traces[block, "fisher"]) for block in subject.present}

    ratios = []
    for block, name in made:
        if name != "fisher":
            values = [
                seconds_for(made[block, name], block, scale, resample)
                / seconds_for(made[block, "fisher"], block, scale, resample)
                for resample in range(RESAMPLES)
            ]
            ratios.append(Ratio(f"{block.value} time: {name} / fisher", values))
    for block, name in made:
        same = "fisher" if kinds[name].gauss_newton else "hutchinson"
        if name != same:
            apart = in_standard_errors(traces[block, name], traces[block, same])
            ratios.append(Ratio(f"{block.value} agreement: {name} - {same}", [apart], at_most=4))
    names = [name for block, name in made if block is subject.present[0]]
    total = {name: seconds_for_all([made[block, name] for block in scale], scale) for name in names}
    for name in names[1:]:
        ratios.append(Ratio(f"all blocks time: {name} / fisher", [total[name] / total["fisher"]]))

    def by_label(function: Callable[[Block, str], list[float]]) -> dict[str, list[float]]:
        return {f"{block.value}, {name}": function(block, name) for block, name in made}

    return {
        "draw, s": by_label(lambda *key: [draw.seconds for draw in made[key]]),
        "trace": by_label(lambda *key: traces[key]),
        "variance / trace^2": by_label(lambda *key: [variance(traces[key]) / scale[key[0]] ** 2]),
        "5 % error, s": by_label(lambda *key: [seconds_for(made[key], key[0], scale)]),
        "5 % error of all blocks, s": {name: [seconds] for name, seconds in total.items()},
    }, ratios


def drawn(methods: Mapping[str, Method], draws: int) -> dict[str, list[Draw]]:
    """`draws` of each method, in turns, after one that is not counted: imports, caches, first touch of memory."""

    def arm(number: int, method: Method) -> Callable[[], Draw]:
        seeds = iter(range(1000 * number, 1000 * (number + 1)))
        return lambda: method.timed(next(seeds))

    arms = {name: arm(number, method) for number, (name, method) in enumerate(methods.items())}
    in_turns(arms, 1)
    return in_turns(arms, draws)


def seconds_for(
    draws: Sequence[Draw], block: Block, scale: Mapping[Block, float], resample: int | None = None
) -> float:
    """Until the standard error of a block's trace is ERROR of its scale."""
    if resample is not None:
        chosen = np.random.default_rng(resample).integers(len(draws), size=len(draws))
        chosen[0] = (chosen[-1] + 1) % len(draws)  # two at least, or there would be no variance
        draws = [draws[i] for i in chosen]
    spread = variance([draw.traces[block] for draw in draws])
    return median(draw.seconds for draw in draws) * spread / (ERROR * scale[block]) ** 2


def seconds_for_all(made: Sequence[Sequence[Draw]], scale: Mapping[Block, float]) -> float:
    """Until every block has its standard error."""
    seconds = [seconds_for(draws, block, scale) for draws, block in zip(made, scale)]
    return max(seconds) if len(made[0][0].traces) > 1 else sum(seconds)


def in_standard_errors(ones: Sequence[float], others: Sequence[float]) -> float:
    """How far two means are apart."""
    error = (variance(ones) / len(ones) + variance(others) / len(others)) ** 0.5
    return abs(fmean(ones) - fmean(others)) / error


def memory(subject: Subject, config: ModelConfig, names: Sequence[str]) -> dict[str, list[float]]:
    """Method, or REFERENCE -> MB of its peak above the model at rest; each in a process of its own. Linux only."""
    if not RESET_PEAK.exists():
        return {}
    found = {}
    # Whatever is freed goes back to the system, so that the next peak is one of what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "subject.pt"
        torch.save({"config": asdict(config), "state": subject.model.state_dict(), "ids": subject.ids}, file)
        for name in (REFERENCE, *names):
            command = [sys.executable, __file__, "--memory-of", name, str(file)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"the memory of {name} was not measured:\n{done.stderr[-3000:]}")
            found[name] = [float(done.stdout.split()[-1])]
    return found


def memory_of(name: str, file: Path) -> float:
    """The same for one of them, in this process."""
    stored = torch.load(file, weights_only=True)
    model = split_fused(build_model(ModelConfig(**stored["config"]), seed=0)).eval()
    model.load_state_dict(stored["state"])
    subject = Subject(model, stored["ids"], classify(model))

    def forward_and_backward() -> None:
        model(**subject.batch).loss.backward()
        model.zero_grad(set_to_none=True)

    methods = {**ours(subject), **theirs(subject, ONE_BLOCK, slow=True)}
    work = forward_and_backward if name == REFERENCE else partial(methods[name].timed, 0)
    work()  # what stays in memory from the first time on is no part of it
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # a small model would find all that it needs in what was freed
    RESET_PEAK.write_text("5")
    before = resident_megabytes("VmRSS")
    work()
    return resident_megabytes("VmHWM") - before


def resident_megabytes(which: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(which))


def main() -> None:
    parser = argument_parser(__doc__, repeats=20)
    parser.add_argument(
        "--shape", choices=SHAPES, default="4x256", help="of the model (default: %(default)s)"
    )
    parser.add_argument("--sequences", type=int, default=4, help="of the batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="trained for (default: %(default)s)")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        name, file = arguments.memory_of
        print(memory_of(name, Path(file)))
        return
    if arguments.repeats < 3:
        parser.error(f"--repeats is {arguments.repeats}; expected 3 or more draws, for their variance")
    if arguments.quick:
        arguments.shape, arguments.steps = "tiny", 3

    config = SHAPES[arguments.shape]
    subject = trained(config, sequences=arguments.sequences, steps=arguments.steps, text=not arguments.quick)
    measurements, ratios = equal_error(subject, arguments.repeats)
    measured = {**ours(subject), **theirs(subject, ONE_BLOCK, slow=True)}
    names = ["fisher", "curvlinops GGN xtrace"] if arguments.quick else list(measured)
    if peaks := memory(subject, config, names):
        measurements["memory, MB"] = peaks
        ratios += [ratio(peaks, name, REFERENCE, what="memory") for name in names]
    settings: dict[str, Any] = {
        "shape": arguments.shape,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "elements": {block.value: count for block, count in subject.blocks.counts().items()},
        "sequences": arguments.sequences,
        "tokens": config.context,
        "trained_steps": arguments.steps,
        "products_in_a_draw_of_hutch++_and_xtrace": MATVECS,
        "standard_error": ERROR,
        "bootstrap_resamples": RESAMPLES,
        "memory_of_block": ONE_BLOCK.value,
        "versions": {name: version(name) for name in ("curvlinops-for-pytorch", "hessian-eigenthings")},
    }
    finish(__file__, arguments, settings=settings, measurements=measurements, ratios=ratios)


if __name__ == "__main__":
    main()
