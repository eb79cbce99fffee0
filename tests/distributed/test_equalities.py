"""Several processes, replicated and sharded, train as one with the same global batch: every model and optimizer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from support.processes import free_port, spawn
from support.several_processes import MODELS, OPTIMIZERS, losses, wrapped

CASES = [(model, optimizer) for model in MODELS for optimizer in OPTIMIZERS]


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
    spawn(worker, (world, free_port(), folder, steps), world)
    found = torch.load(folder / "found.pt", weights_only=True)
    assert len(found) == 3 * len(CASES)
    for (kind, name, way), several in found.items():
        off = float((several - found[kind, name, "one"]).abs().max())
        assert off < 1e-5, f"{kind} {name} {way}: {off:g}"
        assert several[0] != several[-1]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    same_on(2, tmp_path, steps=4)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "steps"), [(2, 20), (4, 6)])
def test_they_do_over_many_steps(tmp_path: Path, world: int, steps: int) -> None:
    same_on(world, tmp_path, steps)
