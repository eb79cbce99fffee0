"""Ratios by two other methods, as far as one learning rate a block can follow them.

Both are read off the same uniform run as the measurement along the update, at the same points.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from blockwise_lr.blocks import Block, classify

LOWEST, HIGHEST = 1.0, 5.0
"""The ratios between which LLR maps its exponents: lr_min_ratio and lr_max_ratio of its repository."""


def signal_to_noise(model: nn.Module, optimizer: AdamW) -> dict[str, float]:
    """Return the signal-to-noise ratio of each block's gradient: sum of m^2 over sum of v, by Adam's moments.

    m and v are bias-corrected. Adam's update has the size m / sqrt(v), so a block with a low value moves less.
    """
    signal, power = defaultdict[str, float](float), defaultdict[str, float](float)
    for name, block in classify(model).items():
        state = optimizer.state[model.get_parameter(name)]
        beta1, beta2 = optimizer.param_groups[0]["betas"]
        step = float(state["step"])
        signal[block.value] += float(state["exp_avg"].double().square().sum()) / (1 - beta1**step) ** 2
        power[block.value] += float(state["exp_avg_sq"].double().sum()) / (1 - beta2**step)
    return {block: signal[block] / power[block] for block in signal}


def undamped(along: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the ratios that undo Adam's damping of noisy blocks: SNR^(-1/2), in the mean log over FFN's.

    The paper on MoLS (arXiv 2605.05794) scales Adam's updates by each module's SNR. Its exact formula was not at hand,
    so this is the idea of it and not the method.
    """
    return _mean([{block: snr**-0.5 for block, snr in found.items()} for found in along])


def exponent(weight: Tensor) -> float:
    """Return Hill's estimate of the exponent of the spectrum of W'W, from its upper half.

    alpha = 1 + k / sum_{i <= k} log(x_i / x_{k+1}),    x: the eigenvalues, largest first; k half of their number
    """
    values = torch.linalg.svdvals(weight.detach().double()).square()
    k = max(1, len(values) // 2)
    return 1 + k / float((values[:k] / values[min(k, len(values) - 1)]).log().sum())


def exponents(model: nn.Module) -> dict[str, float]:
    """Return the exponent of every matrix of the model."""
    return {name: exponent(value) for name, value in model.named_parameters() if value.ndim == 2}


def by_exponent(model: nn.Module, along: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return ratios after LLR (arXiv 2605.22297): the lightest tail gets HIGHEST, the heaviest LOWEST.

    The map is linear in the exponent. A block gets the geometric mean over its matrices, and in the mean log over the
    run. LLR has a rate for every matrix; NORM, which has no spectrum, gets LOWEST.
    """
    blocks = classify(model)
    found = []
    for alphas in along:
        low, high = min(alphas.values()), max(alphas.values())
        logs = defaultdict[str, list[float]](list)
        for name, alpha in alphas.items():
            logs[blocks[name].value].append(
                math.log(LOWEST + (HIGHEST - LOWEST) * (alpha - low) / (high - low))
            )
        found.append({block: math.exp(sum(each) / len(each)) for block, each in logs.items()})
        found[-1][Block.NORM.value] = LOWEST
    return _mean(found)


def _mean(along: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the geometric mean over the points, relative to FFN."""
    logs = {
        block: sum(math.log(found[block] / found["ffn"]) for found in along) / len(along)
        for block in along[0]
    }
    return {block: float(f"{math.exp(log):.3g}") for block, log in logs.items()}
