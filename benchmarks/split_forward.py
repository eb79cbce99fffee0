"""What split_fused costs in forward and backward: GPT-2 small, split against unsplit.

    python benchmarks/split_forward.py

Two copies of one model (transformers' GPT2LMHeadModel with its default configuration, no dropout) on the same
sequence of 1 024 tokens, measured in turns in one process: in fp32, and under bf16 autocast. Gradients are
dropped before each measurement, as zero_grad() does in training. Stops if the two losses differ in one bit.
Needs about 5 GB of memory. Writes results/split_forward-<date>.json.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from _measure import argument_parser, finish, in_turns, ratio
from torch import nn

from blockwise_lr import split_fused


def gpt2(quick: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    tiny = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 128, "n_positions": 64}
    config = GPT2Config(
        **(tiny if quick else {}), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False
    )
    return GPT2LMHeadModel(config).train()


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


def main() -> None:
    arguments = argument_parser(__doc__, repeats=7).parse_args()
    torch.manual_seed(0)
    unsplit = gpt2(arguments.quick)
    models = {"split": split_fused(copy.deepcopy(unsplit)), "unsplit": unsplit}
    length = unsplit.config.n_positions
    tokens = torch.randint(unsplit.config.vocab_size, (1, length))

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
    finish(
        __file__,
        arguments,
        settings={
            "sequences": 1,
            "tokens": length,
            "parameters": sum(p.numel() for p in unsplit.parameters()),
            "bf16": "autocast, weights in fp32",
        },
        measurements=measurements,
        ratios=ratios,
    )


if __name__ == "__main__":
    main()
