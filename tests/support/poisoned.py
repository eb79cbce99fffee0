"""Training with a gradient that is not finite, by a hook on one parameter: in this process, or as a command of its own.

`python tests/poisoned.py STEPS RANK train ...` is `blockwise-lr train ...`, with NaN in the gradient of these
(comma-separated) steps of that rank.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from typing import Any

import torch

from blockwise_lr.cli.entry import main
from blockwise_lr.train import assembly

POISONED = "model.layers.1.mlp.down_proj.weight"


def poisoned_model(steps: Collection[int], value: float = torch.nan, elements: int = 3) -> Any:
    """What stands in for assembly.build_model: the same model, the gradient of POISONED being spoilt at these steps.

    Args:
        steps: numbers of steps (with one micro-batch each), counted from the first backward pass of the process.
        value: what is put into the gradient.
        elements: into how many of its elements.
    """
    build = assembly.build_model

    def build_model(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        passes = 0

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal passes
            passes += 1
            if passes not in steps:
                return gradient
            gradient = gradient.clone()
            gradient.view(-1)[:elements] = value
            return gradient

        model.get_parameter(POISONED).register_hook(spoil)
        return model

    return build_model


if __name__ == "__main__":
    steps, rank, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        assembly.build_model = poisoned_model(list(map(int, steps.split(","))))
    main(arguments)
