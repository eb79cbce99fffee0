"""AdamMini on two processes, replicated (DDP) and sharded (FSDP2): one process's, also where a shard cuts a head."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from blockwise_lr import AdamMini, adopt_state, param_groups, split_fused
from blockwise_lr.directional.updates import unit_updates
from support.cases import gpt2, llama
from support.processes import free_port, spawn

RATIOS = {"emb": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0}
STEPS = 6


def models() -> dict[str, nn.Module]:
    """Three heads in two shards, so that one is cut; and Conv1D, whose outputs are cut along their inputs."""
    torch.manual_seed(0)
    three = llama(hidden_size=12, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=2)
    return {"llama": three, "gpt2": split_fused(gpt2(n_layer=2))}


def sharded(model: nn.Module) -> nn.Module:
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def optimizer_of(model: nn.Module) -> AdamMini:
    return AdamMini(param_groups(model, 1e-3, RATIOS))


def train(model: nn.Module, optimizer: AdamMini, rows: slice, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        tokens = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(step))[rows]
        optimizer.zero_grad()
        logits = model(tokens).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias.original1"):
            continue  # the keys': it has no effect, so its gradient is rounding, which Adam makes a step of
        found = whole(parameter.detach())
        torch.testing.assert_close(found, expected[name.removeprefix("module.")], rtol=0, atol=1e-6)


def by_name(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def two_processes(rank: int, port: int, folder: str) -> None:
    """What each of two gloo processes does; an assertion that fails there fails the test."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    own = slice(2 * rank, 2 * rank + 2)
    for name, model in models().items():
        alone = copy.deepcopy(model)
        one_optimizer = optimizer_of(alone)
        train(alone, one_optimizer, slice(0, 4), STEPS)
        replicated = DistributedDataParallel(copy.deepcopy(model))
        train(replicated, optimizer_of(replicated), own, STEPS)
        assert_same(replicated, by_name(alone))

        shards = sharded(copy.deepcopy(model))
        optimizer = optimizer_of(shards)
        assert all(isinstance(parameter, DTensor) for parameter in shards.parameters())
        train(shards, optimizer, own, STEPS)
        assert_same(shards, by_name(alone))

        # The update, read from the state of a whole model and of its shards, also where a shard cuts a head.
        expected = unit_updates(one_optimizer, list(alone.parameters()))
        found = unit_updates(optimizer, list(shards.parameters()))
        assert expected is not None
        assert found is not None
        for (label, parameter), one, part in zip(shards.named_parameters(), expected, found):
            if label.endswith("bias.original1"):
                continue
            spread = distribute_tensor(one, parameter.device_mesh, parameter.placements).to_local()
            torch.testing.assert_close(part, spread, rtol=1e-3, atol=1e-3)

        # Of the state, only m is as large as the parameters, and it is sharded.
        for state in optimizer.state.values():
            assert isinstance(state["exp_avg"], DTensor)

        with pytest.raises(ValueError, match="is sharded: adopt the full state before fully_shard"):
            adopt_state(optimizer.state_dict(), shards, optimizer_of(shards))

        # Saved here by two processes, it goes on in two, and (below) in one.
        weights, moments = get_state_dict(shards, optimizer)
        checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/{name}")
        resumed = sharded(models()[name])
        other = optimizer_of(resumed)
        load(resumed, other, f"{folder}/{name}")
        for one, two in ((shards, optimizer), (resumed, other)):
            train(one, two, own, 2, first=STEPS)
        for one, two in zip(shards.parameters(), resumed.parameters()):
            assert torch.equal(one.to_local(), two.to_local())
    distributed.barrier()
    distributed.destroy_process_group()


def load(model: nn.Module, optimizer: AdamMini, folder: str) -> None:
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def test_two_processes_train_as_one_and_hand_over_to_one(tmp_path: Path) -> None:
    spawn(two_processes, (free_port(), str(tmp_path)), 2)
    model = models()[
        "llama"
    ]  # one process keeps the original names of what is split, sharded parts their own
    alone = copy.deepcopy(model)
    train(alone, optimizer_of(alone), slice(0, 4), STEPS + 2)
    load(model, other := optimizer_of(model), os.fspath(tmp_path / "llama"))
    train(model, other, slice(0, 4), 2, first=STEPS)
    assert_same(model, by_name(alone))
