"""Try one step of a run's optimizer on a tiny model, so that errors appear before the run begins."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from blockwise_lr.blocks import split_fused
from blockwise_lr.errors import UserError
from blockwise_lr.optimizers.registry import OPTIMIZERS
from blockwise_lr.reason import reason
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.run_sharpness import is_measured

if TYPE_CHECKING:
    from collections.abc import Callable


def check_trial_step(config: TrainConfig, optimizer_on: Callable[[nn.Module], Optimizer]) -> None:
    """Run one trial step for third-party optimizers, and for runs that read sharpness from the optimizer's state.

    Args:
        config: the run's configuration.
        optimizer_on: builds the run's optimizer on a model.

    Raises:
        UserError: the step fails, or the optimizer does not keep the second moment that an estimator reads.
    """
    name, reads = config.optim.optimizer, is_measured(config) and "optimizer" in config.sharpness_estimators
    if name in OPTIMIZERS and not reads:
        return
    size: dict[str, Any] = {"hidden_size": 4, "layers": 1, "heads": 1, "kv_heads": None, "ffn_size": None}
    tiny = replace(config.model, **size, vocab_size=8, context=4)
    model = split_fused(build_model(tiny, seed=0))
    try:
        optimizer = optimizer_on(model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except Exception as error:  # third-party optimizers raise errors of any class
        raise UserError(f"--optimizer {name} cannot step: {reason(error)}") from None
    for parameter in model.parameters() if reads else ():
        moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
        if moment is None or moment.shape != parameter.shape:
            raise UserError(
                f"--sharpness-estimators optimizer reads Adam's second moment (exp_avg_sq), which --optimizer {name} "
                "does not keep for every weight: choose fisher, hutchinson or empirical"
            )
