"""A small model in training, sharded where there are several processes; for tests of its checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from blockwise_lr import AdamMini, cosine_schedule, param_groups, split_fused
from blockwise_lr.optimizers.muon import Muon
from support.cases import gpt2, llama

RATIOS = {"emb": 4.0, "qk": 2.0, "vo": 0.5}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-3),
    "adam-mini": AdamMini,
    "muon": functools.partial(Muon, lr=1e-3),
}


def started(kind: str, name: str, ratios: Any = RATIOS, seed: int = 0) -> tuple[Any, Any, Any]:
    torch.manual_seed(seed)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model: Any = split_fused(gpt2(**quiet)) if kind == "gpt2" else llama(num_key_value_heads=2)
    if distributed.is_initialized():
        fully_shard((model.model.layers if kind == "llama" else model.transformer.h)[0])
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = OPTIMIZERS[name](param_groups(model, 1e-3, ratios))
    return model, optimizer, cosine_schedule(optimizer, warmup_steps=2, total_steps=20, floor=0.0)


def steps(model: nn.Module, optimizer: Any, schedule: Any, numbers: range) -> list[float]:
    """Losses of the global batch; each process takes its rows."""
    losses = []
    rank, world = (
        (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    )
    for i in numbers:
        ids = torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(i)).chunk(world)[rank]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean = loss.detach().clone() / world
        if world > 1:
            distributed.all_reduce(mean)
        losses.append(mean.item())
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


CASES = [(kind, name) for kind in ("gpt2", "llama") for name in OPTIMIZERS]
