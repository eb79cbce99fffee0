"""What groups by block cost in an optimizer step: GPT-2 small's shapes, torch.optim.AdamW(fused=True).

    python benchmarks/optimizer_step.py

Three arms, measured in turns in one process: groups by block with the default ratios on the split model
(`blockwise`), one group on the same parameters (`one group, split`: the same moments too, so that the groups
are all that differs), and one group on the untouched model (`one group, unsplit`: what a user had before).
fp32, random gradients set once. Needs about 4.5 GB of memory. Writes results/optimizer_step-<date>.json.
"""

from __future__ import annotations

from typing import Any

import torch
from _measure import (
    GPT2_SMALL,
    GPT2_TINY,
    argument_parser,
    finish,
    in_turns,
    ratio,
    timed,
    with_gradients,
)
from torch.optim import AdamW

from blockwise_lr import param_groups, split_fused
from blockwise_lr.train.build_model import build_model

LR = 6e-4
SETTINGS: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}


def main() -> None:
    arguments = argument_parser(__doc__, repeats=20).parse_args()
    torch.manual_seed(0)
    shape = GPT2_TINY if arguments.quick else GPT2_SMALL
    split = with_gradients(split_fused(build_model(shape, seed=0)))
    unsplit = with_gradients(build_model(shape, seed=0))

    blockwise = AdamW(param_groups(split, lr=LR, weight_decay=SETTINGS["weight_decay"]), **SETTINGS)
    one_group_split = AdamW(split.parameters(), **SETTINGS)
    one_group_split.state = blockwise.state
    one_group_unsplit = AdamW(unsplit.parameters(), **SETTINGS)
    arms = {
        "blockwise": timed(blockwise.step),
        "one group, split": timed(one_group_split.step),
        "one group, unsplit": timed(one_group_unsplit.step),
    }
    in_turns(arms, 2)  # the first step makes the moments, the second touches their memory for the first time
    seconds = in_turns(arms, arguments.repeats)
    finish(
        __file__,
        arguments,
        settings={
            "parameters": sum(p.numel() for p in unsplit.parameters()),
            "tensors": {"split": len(list(split.parameters())), "unsplit": len(list(unsplit.parameters()))},
            "groups": [group["block"] for group in blockwise.param_groups],
            "optimizer": {"class": "torch.optim.AdamW", **SETTINGS},
        },
        measurements={"step, s": seconds},
        ratios=[
            ratio(seconds, "blockwise", "one group, split", at_most=1.03),
            ratio(seconds, "blockwise", "one group, unsplit", at_most=1.03),
        ],
    )


if __name__ == "__main__":
    main()
