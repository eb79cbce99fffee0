"""measure_directional written out: every update, every gradient and every copy of the parameters is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockwise_lr import Block, classify

LogitsAndLabels = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def updates_of(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), from the state of Adam, AdamW or AdamMini."""
    groups = groups_of(optimizer, parameters)
    updates = []
    for parameter, group in zip(parameters, groups):
        state = optimizer.state[parameter]
        beta1, beta2 = group["betas"]
        t = float(state["step"])
        first, second = wide(state["exp_avg"]), wide(state["exp_avg_sq"])
        for dim, size in enumerate(parameter.shape):  # of Adam-mini: one for each piece
            second = second.repeat_interleave(size // second.shape[dim], dim)
        updates.append(first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group["eps"]))
    return updates


def groups_of(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return [found[id(parameter)] for parameter in parameters]


def wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@contextmanager
def before_last_update(
    parameters: Sequence[nn.Parameter], updates: Sequence[Tensor], groups: Sequence[dict[str, Any]]
) -> Iterator[None]:
    """The parameters where the last update was taken: (theta + lr u) / (1 - lr decay), the decay if decoupled."""
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, update, group in zip(parameters, updates, groups):
            decay = group["weight_decay"] if group.get("decoupled_weight_decay", True) else 0.0
            parameter.add_(update, alpha=group["lr"]).div_(1 - group["lr"] * decay)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept):
                parameter.copy_(value)


def slopes(
    model: nn.Module, optimizer: Optimizer, batch: Any, loss_fn: LogitsAndLabels, move: float
) -> tuple[dict[Block, float], list[list[float]]]:
    """Signals and C of one batch along the last update, of a model whose fused weights are split.

    Parameters must be in float32 or float64. The model is left in eval mode.
    """
    model.eval()
    names, parameters = zip(*model.named_parameters())
    blocks = classify(model)
    updates, groups = updates_of(optimizer, parameters), groups_of(optimizer, parameters)
    present = [block for block in Block if any(blocks[name] is block for name in names)]
    along = {
        block: [u if blocks[name] is block else torch.zeros_like(u) for name, u in zip(names, updates)]
        for block in present
    }
    with before_last_update(parameters, updates, groups):
        logits, labels = (t.flatten(0, 1) for t in loss_fn(model, batch))
        loss = nn.functional.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        signals, changes = {}, []
        for block, direction in along.items():
            products = [g.double() * u.double() for g, u in zip(gradients, direction) if g is not None]
            signals[block] = sum(float(product.sum()) for product in products)
            square = sum(float(u.double().square().sum()) for u in direction)
            numel = sum(u.numel() for name, u in zip(names, updates) if blocks[name] is block)
            scale = move * math.sqrt(numel / square)
            at = [moved_logits(model, batch, loss_fn, direction, sign * scale) for sign in (1, -1)]
            changes.append((at[0] - at[1]) / (2 * scale))
    p = logits.detach().double().softmax(-1)
    matrix = []
    for a in changes:
        mean = (p * a.double()).sum(-1, keepdim=True)
        matrix.append([float((p * (a.double() - mean) * b.double()).sum(-1).mean()) for b in changes])
    return signals, matrix


@torch.no_grad()
def moved_logits(
    model: nn.Module, batch: Any, loss_fn: LogitsAndLabels, direction: Sequence[Tensor], factor: float
) -> Tensor:
    kept = [parameter.clone() for parameter in model.parameters()]
    for parameter, update in zip(model.parameters(), direction):
        parameter.add_(update, alpha=factor)
    logits = loss_fn(model, batch)[0].flatten(0, 1)
    for parameter, value in zip(model.parameters(), kept):
        parameter.copy_(value)
    return logits
