"""What measuring along the optimizer's update costs.

    python benchmarks/directional_cost.py

`measure_directional` on one micro-batch, in passes: seconds over those of forward and backward of that micro-batch, in
turns; and what AutoRatios adds to an optimizer step that it measures (forward, backward, clipping, fused AdamW).
fp32; GPT-2 small on 1 x 512 tokens, which needs about 6 GB, and the quickstart model on its batch.
Writes results/directional_cost-<date>.json.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from _measure import GPT2_SMALL, GPT2_TINY, Ratio, argument_parser, finish, in_turns, ratio
from torch import Tensor, nn

from blockwise_lr import measure_directional, param_groups, split_fused
from blockwise_lr.blocks import Block
from blockwise_lr.experimental.agreement import agreement
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.presets import get_preset


def cost(
    name: str, model: nn.Module, ids: Tensor, repeats: int
) -> tuple[dict[str, list[float]], list[Ratio]]:
    """Seconds of each arm, and their ratios."""
    batch = {"input_ids": ids, "labels": ids}
    groups = param_groups(model, lr=1e-5)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    by_block = {Block(group["block"]): [group] for group in optimizer.param_groups}

    def forward_and_backward() -> float:
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        model(**batch).loss.backward()
        return time.perf_counter() - begin

    def directional() -> float:
        begin = time.perf_counter()
        measure_directional(model, optimizer, batch)
        return time.perf_counter() - begin

    def step() -> float:
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - begin

    def cosines() -> float:
        forward_and_backward()
        begin = time.perf_counter()
        agreement(by_block, optimizer)
        return time.perf_counter() - begin

    step()  # makes the optimizer's moments
    arms = {
        "forward and backward": forward_and_backward,
        "measure_directional": directional,
        "step": step,
        "AutoRatios alone": cosines,
    }
    in_turns(arms, 1)
    seconds = in_turns(arms, repeats)
    return seconds, [
        ratio(
            seconds,
            "measure_directional",
            "forward and backward",
            what=name,
            at_most=len(by_block) + 4,
        ),
        ratio(seconds, "AutoRatios alone", "step", what=name),
    ]


def main() -> None:
    arguments = argument_parser(__doc__, repeats=7).parse_args()
    quickstart, tiny = get_preset("quickstart"), replace(GPT2_TINY, context=32)
    cases: dict[str, tuple[ModelConfig, int]] = {
        "GPT-2 small": (tiny if arguments.quick else replace(GPT2_SMALL, context=512), 1),
        "quickstart": (tiny if arguments.quick else quickstart.model, quickstart.batch_size),
    }
    measurements, ratios = {}, []
    torch.manual_seed(0)
    for name, (shape, sequences) in cases.items():
        model = split_fused(build_model(shape, seed=0)).train()
        ids = torch.randint(shape.vocab_size, (sequences, shape.context))
        seconds, found = cost(name, model, ids, arguments.repeats)
        measurements[f"{name}, s"] = seconds
        ratios += found
        del model
    settings = {name: {**vars(shape), "sequences": sequences} for name, (shape, sequences) in cases.items()}
    finish(__file__, arguments, settings=settings, measurements=measurements, ratios=ratios)


if __name__ == "__main__":
    main()
