"""Where the seconds of `blockwise-lr train` go: from the imports to the first step, and in each part of a step.

    python benchmarks/train_parts.py

Every repeat is two processes, which import everything that `train` imports before their clock starts. `first` has
an empty cache, so that its text is tokenized, and takes one step. `run` is the quickstart preset with its default
settings, its clock stopped at every change between the parts: data (batches out of the loader), forward, backward,
clipping, optimizer (step, schedule, zeroing of gradients), logging (metrics, TensorBoard, progress), evaluation,
checkpoint, the rest of the loop, and what is before and after it. A part does not have the seconds of the parts
inside it. On a CPU nothing runs behind the clock's back.

Stalls are the seconds of evaluation and checkpoint by those of the training itself. For a paper preset they are
computed: evaluation by tokens (both costs in proportion to the model), and a checkpoint by its bytes and the
measured bytes/s, as the tokens/s that the machine would have to reach for it to be a stall of 2 %. The loader is
read alone, against 10 times the speed of a step. Writes results/train_parts-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _clock import Clock
from _measure import Ratio, argument_parser, finish, in_turns
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from train_throughput import tiny
from transformers import PreTrainedModel
from transformers.trainer_callback import CallbackHandler

from blockwise_lr.checkpoints.manifest import checkpoints
from blockwise_lr.data.prepare import TrainingStream, prepare_data
from blockwise_lr.train.allocator import keep_freed_memory
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig, TrainConfig, config_from_dict
from blockwise_lr.train.presets import get_preset
from blockwise_lr.train.pretrain_trainer import PretrainTrainer
from blockwise_lr.train.run import train

PAPER = "gpt2-small"
FIRST_STEP_SECONDS, STALL, LOADER = 10.0, 0.02, 10.0
# The calls of a run by the part that they are.
PARTS: dict[str, list[tuple[type, str]]] = {
    "rest": [(PretrainTrainer, "_run_epoch")],
    "data": [(PretrainTrainer, "get_batch_samples")],
    "forward": [(PretrainTrainer, "compute_loss")],
    "backward": [(Accelerator, "backward")],
    "clipping": [(PretrainTrainer, "_clip_grad_norm"), (PretrainTrainer, "_get_grad_norm")],
    "optimizer": [
        (AcceleratedOptimizer, "step"),
        (AcceleratedScheduler, "step"),
        (PreTrainedModel, "zero_grad"),
    ],
    "logging": [(PretrainTrainer, "_maybe_log_save_evaluate"), (CallbackHandler, "call_event")],
    "evaluation": [(PretrainTrainer, "evaluate")],
    "checkpoint": [(PretrainTrainer, "_save_checkpoint")],
}
STEP = ("data", "forward", "backward", "clipping", "optimizer", "logging", "rest")


def measured_run(config: TrainConfig, out: Path) -> dict[str, Any]:
    """Train `config` in this process: seconds by part, and those to the first step."""
    keep_freed_memory()  # as the command does
    begin, clock, steps = time.perf_counter(), Clock(), []
    for name, calls in PARTS.items():
        for owner, method in calls:
            clock.of(owner, method, name)
    step = AcceleratedOptimizer.step

    def noting_when(self: AcceleratedOptimizer, closure: Any = None) -> None:
        step(self, closure)
        steps.append(time.perf_counter() - begin)

    AcceleratedOptimizer.step = noting_when
    train(config, out)
    files = [file for file in checkpoints(out)[-1].iterdir() if file.is_file()]
    return {
        "first step": steps[0],
        "parts": dict(clock.seconds),
        "checkpoint bytes": sum(file.stat().st_size for file in files),
    }


def in_a_process(config: TrainConfig, folder: Path, threads: int) -> dict[str, Any]:
    """:func:`measured_run` in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        (place / "config.json").write_text(json.dumps(config.to_dict()))
        command = [sys.executable, __file__, "--child", str(place)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the run failed:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads((place / "found.json").read_text())
        return found


def first_step(config: TrainConfig, folder: Path, threads: int) -> dict[str, Any]:
    """One step with an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        data, optim = replace(config.data, cache=cache), replace(config.optim, warmup_fraction=0.0)
        return in_a_process(replace(config, steps=1, data=data, optim=optim), folder, threads)


def loader(config: TrainConfig, *, context: int, batch_size: int) -> Callable[[], float]:
    """A function that reads the loader alone, in windows of `context` tokens: tokens/s."""
    data = prepare_data(
        config.data, vocab_size=config.model.vocab_size, context=config.model.context, progress=False
    )
    n_batches = max(1, 10 * config.steps * config.model.context * config.batch_size // (context * batch_size))

    def read() -> float:
        stream = TrainingStream(data.train, context, seed=0, n_samples=n_batches * batch_size)
        begin = time.perf_counter()
        batches = torch.utils.data.DataLoader(stream, batch_size)
        n_tokens = sum(batch["input_ids"].numel() for batch in batches)
        return n_tokens / (time.perf_counter() - begin)

    return read


def checkpoint_bytes(model: ModelConfig) -> int:
    """Of weights and AdamW's two moments, all in fp32."""
    with torch.device("meta"):
        return 12 * sum(p.numel() for p in build_model(model, seed=0).parameters())


def times(every: int, steps: int) -> int:
    """How often something happens that happens every so many steps and at the last one."""
    return -(-steps // every)


def quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below)]


def main() -> None:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS (default: %(default)s)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        config = config_from_dict(json.loads((arguments.child / "config.json").read_text()))
        found = measured_run(config, arguments.child / "run")
        (arguments.child / "found.json").write_text(json.dumps(found))
        return

    torch.set_num_threads(arguments.threads)
    paper = get_preset(PAPER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = replace(get_preset("quickstart"), device="cpu")
        if arguments.quick:
            config = replace(tiny(folder), eval_every=4, save_every=4, eval_tokens=64)
        context, batch_size = config.model.context, config.batch_size
        prepare_data(config.data, vocab_size=config.model.vocab_size, context=context)
        runs = in_turns(
            {
                "first": lambda: first_step(config, folder, arguments.threads),
                "run": lambda: in_a_process(config, folder, arguments.threads),
            },
            arguments.repeats,
        )
        shapes = [(batch_size, context), (paper.batch_size, 64 if arguments.quick else paper.model.context)]
        loads = in_turns(
            {f"{n} x {length} tokens": loader(config, context=length, batch_size=n) for n, length in shapes},
            arguments.repeats,
        )

    parts = [run["parts"] for run in runs["run"]]
    training = [sum(each[name] for name in STEP) for each in parts]
    speed = [config.steps * batch_size * context / seconds for seconds in training]
    evaluation, saving = ([each[name] for each in parts] for name in ("evaluation", "checkpoint"))
    n_evaluations, n_checkpoints = (
        times(every, config.steps) for every in (config.eval_every, config.save_every)
    )
    by_token = [s / (n_evaluations * config.eval_tokens) * v for s, v in zip(evaluation, speed)]
    written = [run["checkpoint bytes"] * n_checkpoints / s for run, s in zip(runs["run"], saving)]
    paper_tokens = paper.batch_size * paper.accumulation * paper.model.context
    paper_bytes = checkpoint_bytes(paper.model)
    to_first = {arm: [run["first step"] for run in each] for arm, each in runs.items()}
    finish(
        __file__,
        arguments,
        settings={
            "threads": arguments.threads,
            "quickstart": {
                "context": context, "batch_size": batch_size, "steps": config.steps,
                "precision": config.precision, "log_every": config.log_every,
                "eval_every": config.eval_every, "eval_tokens": config.eval_tokens,
                "save_every": config.save_every, "evaluations": n_evaluations, "checkpoints": n_checkpoints,
            },
            PAPER: {
                "tokens_per_step_and_process": paper_tokens, "eval_every": paper.eval_every,
                "eval_tokens": paper.eval_tokens, "save_every": paper.save_every,
                "checkpoint_bytes": paper_bytes,
            },
        },
        measurements={
            "imports to first step, s": to_first,
            "share of the training": {name: quotients([p[name] for p in parts], training) for name in STEP},
            "seconds of the run": {name: [p[name] for p in parts] for name in parts[0]},
            "training alone, tokens/s": {"run": speed},
            "loader alone, tokens/s": loads,
            "a token evaluated / a token trained": {"run": by_token},
            "checkpoints, bytes/s": {"run": written},
            f"{PAPER}, tokens/s a process where checkpoints stall 2 % (computed)": {
                "run": [STALL * paper.save_every * paper_tokens * each / paper_bytes for each in written]
            },
        },
        ratios=[
            Ratio(
                f"imports to first step / 10 s: {what}",
                [seconds / FIRST_STEP_SECONDS for seconds in to_first[arm]],
                at_most=1.0,
            )
            for arm, what in (("run", "text in the cache"), ("first", "text to tokenize"))
        ]
        + [
            Ratio(f"loader / training, tokens/s: {shape}", quotients(values, speed), at_least=LOADER)
            for shape, values in loads.items()
        ]
        + [
            Ratio("evaluation / training: quickstart", quotients(evaluation, training), at_most=STALL),
            Ratio("checkpoint / training: quickstart", quotients(saving, training), at_most=STALL),
            Ratio(
                f"evaluation / training: {PAPER} (computed)",
                [each * paper.eval_tokens / (paper.eval_every * paper_tokens) for each in by_token],
                at_most=STALL,
            ),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
