"""What split_fused costs in forward and backward: GPT-2 small, split against unsplit.

    python benchmarks/split_forward.py

Two copies of one model (transformers' GPT2LMHeadModel in its default sizes, without dropout) on the same
sequence of 1 024 tokens, measured in turns in one process: in fp32, and under bf16 autocast. Gradients are
dropped before each measurement, as zero_grad() does in training. Stops if the two losses differ in one bit.
A third copy, unsplit too, shows the noise: its ratio would be 1 on a quiet machine. What splitting adds, the
concatenations and their backward pass, is also timed alone, 100 times, as a share of the unsplit pass.
Needs about 7 GB of memory. Writes results/split_forward-<date>.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from _measure import GPT2_SMALL, GPT2_TINY, Ratio, argument_parser, finish, in_turns, ratio
from torch import nn

from blockwise_lr import split_fused
from blockwise_lr.train.build_model import build_model


def timed(model: nn.Module, tokens: torch.Tensor, bf16: bool) -> Callable[[], tuple[float, float]]:
    """A function that runs forward and backward once: (seconds, loss)."""

    def run() -> tuple[float, float]:
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return time.perf_counter() - begin, loss.item()

    return run


def concatenations_alone(model: nn.Module) -> Callable[[], float]:
    """A function that puts every split weight together and takes the gradient back to its parts once: seconds."""
    split = [(m, leaf) for m in model.modules() for leaf in getattr(m, "parametrizations", {})]
    gradients = [torch.randn_like(getattr(m, leaf)) for m, leaf in split]

    def run() -> float:
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        torch.autograd.backward([getattr(m, leaf) for m, leaf in split], gradients)
        return time.perf_counter() - begin

    return run


def main() -> None:
    arguments = argument_parser(__doc__, repeats=12).parse_args()
    shape = GPT2_TINY if arguments.quick else GPT2_SMALL
    torch.manual_seed(0)
    unsplit = build_model(shape, seed=0).train()
    models = {
        "split": split_fused(build_model(shape, seed=0).train()),
        "unsplit": unsplit,
        "unsplit again": build_model(shape, seed=0).train(),
    }
    tokens = torch.randint(shape.vocab_size, (1, shape.context))

    measurements, ratios = {}, []
    for precision in ("fp32", "bf16"):
        arms = {name: timed(model, tokens, precision == "bf16") for name, model in models.items()}
        losses = {loss for measured in in_turns(arms, 1).values() for _, loss in measured}
        if len(losses) > 1:
            raise SystemExit(f"{precision}: the losses of split and unsplit differ: {sorted(losses)}")
        measured = in_turns(arms, arguments.repeats)
        seconds = {name: [value for value, _ in runs] for name, runs in measured.items()}
        measurements[f"{precision}, s"] = seconds
        ratios.append(ratio(seconds, "split", "unsplit", what=precision, at_most=1.02))
        ratios.append(ratio(seconds, "unsplit again", "unsplit", what=precision))
        alone = concatenations_alone(models["split"])
        shares = [alone() / median(seconds["unsplit"]) for _ in range(100)]
        ratios.append(Ratio(f"{precision}: concatenations alone / unsplit", shares))
    finish(
        __file__,
        arguments,
        settings={
            "sequences": 1,
            "tokens": shape.context,
            "parameters": sum(p.numel() for p in unsplit.parameters()),
            "bf16": "autocast, weights in fp32",
        },
        measurements=measurements,
        ratios=ratios,
    )


if __name__ == "__main__":
    main()
