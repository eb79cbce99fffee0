"""What an optimizer costs against AdamW (fused): seconds of a step, bytes of its state, and memory of a training step.

    python benchmarks/optimizers.py

Steps are measured in turns with AdamW's, on the same parameters and on random gradients set once, in fp32: every
optimizer of the registry on GPT-2 small's shapes (split), Adam-mini and the package adam-mini 1.1.1 on LLaMA 0.25B's
too. Bytes are those of the state's own tensors. Peak memory is that of a process that trains GPT-2 small for three
steps of 2 sequences of 256 tokens. SOAP's matrix decompositions take minutes on a CPU: it is measured on smaller shapes
(--quick's). Sophia needs second derivatives and is left out. Needs about 9 GB of memory. Writes
results/optimizers-<date>.json.
"""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

import torch
from _measure import (
    GPT2_SMALL,
    GPT2_TINY,
    Ratio,
    argument_parser,
    finish,
    in_turns,
    ratio,
    timed,
    usage_of,
    with_gradients,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from blockwise_lr import AdamMini, build_optimizer, param_groups, split_fused
from blockwise_lr.optimizers.registry import OPTIMIZERS
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.presets import get_preset

LR = 6e-4
ELSEWHERE = {"sophia", "soap"}
SLOW = {"muon"}
MINI = ("adam-mini", "adam-mini, compiled", "adam-mini 1.1.1")
MEMORY = ("adamw", "adam-mini")


def main() -> None:
    parser = argument_parser(__doc__, repeats=15)
    parser.add_argument("--memory-of", choices=MEMORY, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        train(arguments.memory_of, GPT2_TINY if arguments.quick else GPT2_SMALL)
        return
    tiny, small = GPT2_TINY, GPT2_SMALL
    shapes = {"GPT-2 tiny" if arguments.quick else "GPT-2 small": tiny if arguments.quick else small}
    if not arguments.quick:
        shapes["LLaMA 0.25B"] = get_preset("llama-0.25b").model
    names = [*MINI, *(name for name in OPTIMIZERS if name not in {"adamw", "adam-mini", *ELSEWHERE})]
    measurements: dict[str, Any] = {}
    ratios: list[Ratio] = []
    for title, shape in shapes.items():
        for name in names if title.startswith("GPT-2") else MINI:
            compare(name, title, shape, 3 if name in SLOW else arguments.repeats, measurements, ratios)
    compare("soap", "GPT-2 tiny", tiny, 3, measurements, ratios)
    measurements["peak memory of training, GiB"] = {
        name: [peak_memory(name, arguments.quick)] for name in MEMORY
    }
    finish(
        __file__,
        arguments,
        settings={"lr": LR, "shapes": {title: vars(shape) for title, shape in shapes.items()}},
        measurements=measurements,
        ratios=ratios,
    )


def compare(
    name: str,
    title: str,
    shape: ModelConfig,
    repeats: int,
    measurements: dict[str, Any],
    ratios: list[Ratio],
    device: str = "cpu",
    reference: bool = True,
) -> None:
    """Seconds and state bytes of one optimizer and of AdamW, in turns, on one model.

    Compiled Adam-mini is also compared with the package adam-mini 1.1.1, unless `reference` is False.
    """
    model = with_gradients(split_fused(build_model(shape, seed=0)).to(device))
    adamw, other = make("adamw", model, shape), make(name, model, shape)
    arms = {"adamw": timed(adamw.step), name: timed(other.step)}
    in_turns(arms, 3)  # the state is made, compiled, and its memory touched
    seconds = in_turns(arms, repeats)
    measurements[f"step, s: {name}, {title}"] = seconds
    bytes_of = {"adamw": [state_bytes(adamw)], name: [state_bytes(other)]}
    measurements[f"state, MB: {name}, {title}"] = {key: [value[0] / 1e6] for key, value in bytes_of.items()}
    compiled = name == "adam-mini, compiled"
    ratios.append(ratio(seconds, name, "adamw", what=f"step, {title}", at_most=1.25 if compiled else None))
    limit = 0.51 if name.startswith("adam-mini") and name != "adam-mini 1.1.1" else None
    ratios.append(ratio(bytes_of, name, "adamw", what=f"state, {title}", at_most=limit))
    print(
        ratios[-2].name, sorted(ratios[-2].values)[len(ratios[-2].values) // 2], ratios[-1].values, flush=True
    )
    if compiled and reference:
        theirs = make("adam-mini 1.1.1", model, shape)
        arms = {name: timed(other.step), "adam-mini 1.1.1": timed(theirs.step)}
        in_turns(arms, 2)
        against = in_turns(arms, repeats)
        ratios.append(ratio(against, "adam-mini 1.1.1", name, what=f"step, {title}", at_least=2.0))
    del adamw, other, model, arms
    gc.collect()


def make(name: str, model: nn.Module, shape: ModelConfig) -> Optimizer:
    if name == "adam-mini, compiled":
        return AdamMini(param_groups(model, LR), lr=LR, compile=True)
    if name == "adam-mini 1.1.1":
        from adam_mini import Adam_mini

        heads = {"dim": shape.hidden_size, "n_heads": shape.heads}
        found: Optimizer = Adam_mini(
            model.named_parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, verbose=False, **heads
        )
        return found
    return build_optimizer(name, model, LR)


def state_bytes(optimizer: Optimizer) -> int:
    """Of all tensors that the state holds, each counted once."""
    found: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)

    visit(dict(optimizer.state))
    return sum(found.values())


def train(name: str, shape: ModelConfig) -> None:
    """Three steps of training in this process, for :func:`peak_memory`."""
    torch.manual_seed(0)
    model = split_fused(build_model(shape, seed=0))
    optimizer = build_optimizer(name, model, LR)
    for _ in range(3):
        ids = torch.randint(shape.vocab_size or 100, (2, min(256, shape.context)))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def peak_memory(name: str, quick: bool) -> float:
    """GiB of a process that trains with this optimizer."""
    flags = ["--memory-of", name, *(["--quick"] if quick else [])]
    return usage_of(sys.executable, __file__, *flags)[1]


if __name__ == "__main__":
    main()
