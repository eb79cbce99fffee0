"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

# name -> class and its arguments, given (beta1, beta2, eps). Weight decay and learning rate come with the groups.
_REGISTRY: dict[str, Callable[[float, float, float], tuple[type[Optimizer], dict[str, Any]]]] = {
    "adamw": lambda b1, b2, eps: (torch.optim.AdamW, {"betas": (b1, b2), "eps": eps, "fused": True}),
    "nadamw": lambda b1, b2, eps: (
        torch.optim.NAdam,
        {"betas": (b1, b2), "eps": eps, "decoupled_weight_decay": True},
    ),
}

OPTIMIZERS: tuple[str, ...] = tuple(_REGISTRY)
"""The names that :func:`optimizer_class` knows."""


def optimizer_class(
    name: str, *, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8
) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class and keyword arguments of the optimizer of that name, for the groups of ``param_groups``.

    Raises:
        ValueError: an unknown name; the message lists those there are.

    Example:
        >>> optimizer_class("adamw")[0].__name__
        'AdamW'
    """
    if name not in _REGISTRY:
        raise ValueError(f"no optimizer named {name!r}; there are {', '.join(OPTIMIZERS)}")
    return _REGISTRY[name](beta1, beta2, eps)
