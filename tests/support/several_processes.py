"""Small models of every kind, trained by one process or by several, replicated or sharded; for tests of equality."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from blockwise_lr import (
    AdamMini,
    AutoRatios,
    Block,
    clip_grad_norm_by_block,
    cosine_schedule,
    param_groups,
    split_fused,
)
from blockwise_lr.optimizers.muon import Muon
from support.cases import gpt2, llama, mixtral

LR = 1e-4  # larger ones let rounding grow
RATIOS = {"emb": 3.0, "qk": 2.0, "vo": 0.5, "head": 3.0}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=LR),
    "adam-mini": AdamMini,
    "muon": functools.partial(Muon, lr=LR),
    "adamw, auto": functools.partial(torch.optim.AdamW, lr=LR),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: split_fused(gpt2(n_layer=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "llama": lambda: llama(num_hidden_layers=2, num_key_value_heads=2),
    "mixtral": mixtral,
}


def wrapped(model: Any, way: str) -> Any:
    if way == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)  # experts that no token chose
    for layer in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def losses(
    model: Any, name: str, steps: int, rank: int = 0, world: int = 1, *, bf16: bool = False
) -> list[float]:
    """Eight sequences a step, accumulated in two halves, clipped by block; each process takes its share."""
    optimizer = OPTIMIZERS[name](param_groups(model, LR, RATIOS))
    schedule = cosine_schedule(optimizer, warmup_steps=2, total_steps=100)
    auto = AutoRatios(optimizer, schedule) if name.endswith("auto") else None
    found = []
    for step in range(steps):
        ids = torch.randint(3, 40, (8, 8), generator=torch.Generator().manual_seed(step))
        mean = torch.zeros(())
        for half in ids.chunk(2):
            own = half.chunk(world)[rank]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(input_ids=own).logits.float()
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), own[:, 1:].flatten()) / 2
            loss.backward()
            mean += loss.detach() / world
        clip_grad_norm_by_block(model, 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if world > 1:
            distributed.all_reduce(mean)
        found.append(mean.item())
    if auto is not None:
        assert any(auto.ratios[Block(block)] != ratio for block, ratio in RATIOS.items())
        found += auto.ratios.values()
    return found
