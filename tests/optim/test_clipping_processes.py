"""Clipping by block on two gloo processes, replicated (DDP) and sharded (FSDP2): the norms and weights of one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from blockwise_lr import clip_grad_norm_by_block, param_groups, split_fused
from blockwise_lr.optim import nonfinite_gradients
from sharpness.references import gpt2, next_tokens, tokens
from sharpness.test_distributed import fully_sharded
from support.processes import free_port, spawn

LIMITS = {"emb": 0.05, "qk": 0.02, "vo": 100.0, "norm": math.inf, "ffn": 0.01}
BROKEN = "transformer.h.1.mlp.c_fc.weight"


def split() -> nn.Module:
    torch.manual_seed(1)
    return split_fused(gpt2(n_layer=2))


def trained(model: nn.Module, rows: slice, use_groups: bool = False) -> list[dict[str, float]]:
    """Three steps of AdamW on these rows of each batch; the norms of every step."""
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3), lr=1e-3)
    norms = []
    for seed in range(3):
        batch = {name: value[rows] for name, value in tokens(rows=4, length=6, seed=seed).items()}
        optimizer.zero_grad()
        logits, labels = next_tokens(model, batch)
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        found = clip_grad_norm_by_block(
            model, LIMITS, blocks=optimizer.param_groups if use_groups else None, norm_type=2
        )
        assert not any(isinstance(norm, DTensor) for norm in found.values())
        norms.append({block.value: float(norm) for block, norm in found.items()})
        optimizer.step()
    return norms


class Few(nn.Module):
    """A model with parameters of which one process has nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.wte, self.ln_f = nn.Embedding(9, 3), nn.LayerNorm(1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.wte(ids) * self.ln_f.weight).square().sum() + self.ln_f.bias.sum()


def norms_of_few(model: nn.Module) -> dict[str, dict[str, float]]:
    model(torch.arange(9)).backward()
    found = {
        str(order): clip_grad_norm_by_block(model, 1e9, norm_type=order) for order in (1.0, 2.0, math.inf)
    }
    return {order: {block.value: float(n) for block, n in each.items()} for order, each in found.items()}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def backward(model: nn.Module) -> nn.Module:
    logits, labels = next_tokens(model, tokens(rows=2, length=6))
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return model


def two_processes(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = slice(2 * rank, 2 * rank + 2)
    found: dict[str, Any] = {}
    for kind, wrap in {"ddp": DistributedDataParallel, "fsdp": fully_sharded}.items():
        for use_groups in (False, True):
            model = wrap(split())
            norms = trained(model, rows, use_groups)
            found[f"{kind} {use_groups}"] = (norms, weights(model))

    # One exchange for all norms, however many parameters and blocks.
    model = backward(fully_sharded(split()))
    with CommDebugMode() as exchanged:
        clip_grad_norm_by_block(model, LIMITS)
    found["exchanges"] = sum(exchanged.get_comm_counts().values())

    # The largest element of all.
    found["inf"] = {
        block.value: float(norm)
        for block, norm in clip_grad_norm_by_block(
            model.zero_grad() or backward(model), 1e3, norm_type=math.inf
        ).items()
    }

    # A NaN in the shard of one process is seen by both, with the counts of the whole.
    model = backward(fully_sharded(split()))
    if rank == 1:
        dict(model.named_parameters())[BROKEN].grad.to_local()[0, 0] = math.nan
    found["nonfinite"] = {block.value: names for block, names in nonfinite_gradients(model).items()}
    with pytest.raises(RuntimeError) as refused:
        clip_grad_norm_by_block(model, LIMITS, error_if_nonfinite=True)
    found["refused"] = str(refused.value)

    # Sharded and whole parameters in one block.
    mixed = split()
    whole = {p for name, p in mixed.named_parameters() if name.endswith("bias")}
    fully_shard(mixed, ignored_params=whole)
    assert {isinstance(p, DTensor) for p in mixed.parameters()} == {True, False}
    backward(mixed)
    norms = {block.value: float(n) for block, n in clip_grad_norm_by_block(mixed, 0.01).items()}
    gradients = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in mixed.named_parameters()
    }
    found["mixed"] = (norms, gradients)
    few = Few()
    fully_shard(few)
    assert all(isinstance(parameter, DTensor) for parameter in few.parameters())
    found["few"] = norms_of_few(few)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    spawn(two_processes, (free_port(), str(folder)), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("use_groups", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_clip_and_train_as_one(found, kind, use_groups):
    alone = split()
    expected = trained(alone, slice(0, 4), use_groups)
    assert any(step[block] > limit for step in expected for block, limit in LIMITS.items())
    for process in found:
        norms, after = process[f"{kind} {use_groups}"]
        for step, own in zip(expected, norms, strict=True):
            assert own == pytest.approx(step, rel=1e-6)
        for name, value in weights(alone).items():
            torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-8)


def test_all_norms_of_a_sharded_model_are_exchanged_at_once(found):
    assert [process["exchanges"] for process in found] == [1, 1]


def test_the_largest_element_is_that_of_all_shards(found):
    alone = backward(split())
    expected = {
        block.value: float(norm)
        for block, norm in clip_grad_norm_by_block(alone, 1e3, norm_type=math.inf).items()
    }
    for process in found:
        assert process["inf"] == pytest.approx(expected, rel=1e-6)


def test_a_process_without_a_part_of_a_parameter_finds_the_norms_of_all(found):
    for order, expected in norms_of_few(Few()).items():
        for each in found:
            assert each["few"][order] == pytest.approx(expected, rel=1e-5)


def test_every_process_names_what_is_in_the_shard_of_one(found):
    numel = dict(split().named_parameters())[BROKEN].numel()
    for process in found:
        assert process["nonfinite"] == {"ffn": [BROKEN]}
        assert f"ffn: {BROKEN} (1 nan, 0 inf of {numel}). Leave this step out" in process["refused"]


def test_sharded_and_whole_parameters_of_one_block_are_clipped_together(found):
    alone = backward(split())
    norms = {block.value: float(n) for block, n in clip_grad_norm_by_block(alone, 0.01).items()}
    for process in found:
        assert process["mixed"][0] == pytest.approx(norms, rel=1e-6)
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(process["mixed"][1][name], parameter.grad, rtol=1e-6, atol=1e-9)
