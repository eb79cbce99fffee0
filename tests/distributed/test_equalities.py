"""Several processes, replicated and sharded, train as one with the same global batch: every model and optimizer."""

from __future__ import annotations

import copy
import functools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
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
from blockwise_lr.optim.muon import Muon
from cases import gpt2, llama, mixtral

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
CASES = [(model, optimizer) for model in MODELS for optimizer in OPTIMIZERS]


def wrapped(model: Any, way: str) -> Any:
    if way == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)  # experts that no token chose
    for layer in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def losses(model: Any, name: str, steps: int, rank: int = 0, world: int = 1) -> list[float]:
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
            logits = model(input_ids=own).logits
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


def worker(rank: int, world: int, port: int, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    found: dict[tuple[str, str, str], Tensor] = {}
    for kind, name in CASES:
        torch.manual_seed(0)
        model = MODELS[kind]()
        length = 3 if name == "muon" else steps  # its orthogonalisation makes rounding grow
        if rank == 0:
            found[kind, name, "one"] = torch.tensor(losses(copy.deepcopy(model), name, length))
        for way in ("ddp", "fsdp2"):
            several = losses(wrapped(copy.deepcopy(model), way), name, length, rank, world)
            found[kind, name, way] = torch.tensor(several)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    distributed.barrier()  # one that is gone while another still listens aborts that one
    distributed.destroy_process_group()


def same_on(world: int, folder: Path, steps: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, (world, port, folder, steps), nprocs=world)
    found = torch.load(folder / "found.pt", weights_only=True)
    assert len(found) == 3 * len(CASES)
    for (kind, name, way), several in found.items():
        off = float((several - found[kind, name, "one"]).abs().max())
        assert off < 1e-5, f"{kind} {name} {way}: {off:g}"
        assert several[0] != several[-1]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    same_on(2, tmp_path, steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_they_do_over_a_hundred_steps(tmp_path: Path, world: int) -> None:
    same_on(world, tmp_path, steps=100)
