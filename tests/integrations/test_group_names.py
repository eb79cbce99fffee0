"""The names of parameter groups in torch's checkpoints, in sharded ones and in optimizers that fuse their step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

pytest.importorskip("lightning")

from blockwise_lr import cosine_schedule, param_groups
from blockwise_lr.integrations.lightning import name_groups
from blockwise_lr.integrations.sharded import load_sharded, save_sharded
from support import tiny_models
from support.processes import free_port, spawn
from support.sharded_training import started, steps, whole

NAMES = ["norm", "emb", "qk", "qk-no-decay", "vo", "vo-no-decay", "ffn", "ffn-no-decay", "pos"]


def trained(named=True, **options):
    """A model whose optimizer has taken two steps."""
    model = tiny_models.gpt2(split=True, dropout=0.0)
    groups = param_groups(model, lr=1e-3, no_decay="1d")
    optimizer = torch.optim.AdamW(name_groups(groups) if named else groups, lr=1e-3, **options)
    schedule = cosine_schedule(optimizer, warmup_steps=1, total_steps=10)
    steps(model, optimizer, schedule, range(2))
    return model, optimizer, schedule


def names(optimizer):
    return [group["name"] for group in optimizer.param_groups]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_a_step_does_not_depend_on_the_names(options):
    (model, optimizer, _), (plain, *_) = trained(**options), trained(named=False, **options)
    assert names(optimizer) == NAMES
    for value, expected in zip(model.parameters(), plain.parameters()):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("flat", [False, True])
def test_torchs_distributed_checkpoints_keep_the_names(flat, tmp_path):
    model, optimizer, _ = trained()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    checkpoint.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)

    other, new, _ = trained()
    state = get_optimizer_state_dict(other, new, options=options)
    checkpoint.load({"optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, new, state, options=options)
    assert names(new) == NAMES
    for parameter, moved in zip(model.parameters(), other.parameters()):
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], new.state[moved]["exp_avg_sq"])


@pytest.mark.parametrize("named", [False, True])
def test_sharded_checkpoints_with_and_without_names_can_be_loaded(named, tmp_path):
    model, optimizer, schedule = trained(named)
    save_sharded(tmp_path / "checkpoint-2", model, optimizer, schedule)
    other = tiny_models.gpt2(split=True, dropout=0.0, seed=1)
    new = torch.optim.AdamW(name_groups(param_groups(other, lr=1e-3, no_decay="1d")), lr=1e-3)
    load_sharded(tmp_path / "checkpoint-2", other, new, cosine_schedule(new, warmup_steps=1, total_steps=10))
    assert names(new) == NAMES
    assert all(
        torch.equal(value, expected) for value, expected in zip(other.parameters(), model.parameters())
    )


def sharded(rank: int, world: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model, optimizer, schedule = started("gpt2", "adamw")
    name_groups(optimizer.param_groups)
    steps(model, optimizer, schedule, range(3))
    save_sharded(folder / "checkpoint-3", model, optimizer, schedule)
    other, new, follow = started("gpt2", "adamw", seed=1)
    name_groups(new.param_groups)
    load_sharded(folder / "checkpoint-3", other, new, follow)
    found: dict[str, Any] = {"names": names(new)}
    for key, (own, its_optimizer, its_schedule) in {
        "expected": (model, optimizer, schedule), "loaded": (other, new, follow),
    }.items():  # fmt: skip
        steps(own, its_optimizer, its_schedule, range(3, 5))
        found[key] = whole(own)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    distributed.barrier()  # one that is gone while another still listens aborts that one
    distributed.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_run_keeps_the_names(tmp_path):
    spawn(sharded, (2, free_port(), tmp_path), 2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["names"] == ["norm", "emb", "qk", "vo", "ffn", "pos"]
    assert all(torch.equal(value, found["loaded"][name]) for name, value in found["expected"].items())
