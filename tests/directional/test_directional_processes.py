"""measure_directional on two processes, replicated (DDP) and sharded (FSDP2): the numbers of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from blockwise_lr import Block, DirectionalReport, measure_directional, param_groups, split_fused
from blockwise_lr.experimental.agreement import agreement
from sharpness.references import gpt2, next_tokens
from sharpness.test_distributed import fully_sharded, share_of, whole_batches
from support.processes import free_port, spawn

pytestmark = pytest.mark.slow  # two processes measure every case


def split() -> nn.Module:
    torch.manual_seed(1)
    return split_fused(gpt2(n_layer=2))


def after_steps(model: nn.Module, batches: list[Any], scale: float = 1.0) -> torch.optim.Optimizer:
    """Three steps on the batches; `scale` makes the mean over processes the mean over all tokens."""
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3), lr=1e-3)
    for batch in batches[:3]:
        optimizer.zero_grad()
        logits, labels = next_tokens(model, batch)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (loss * scale / 20).backward()
        optimizer.step()
    return optimizer


def cosines(model: nn.Module, batches: list[Any], scale: float = 1.0) -> dict[str, float]:
    """What AutoRatios sees: the gradients of a fourth batch and the update of the third step."""
    optimizer = after_steps(model, batches, scale)
    optimizer.zero_grad()
    logits, labels = next_tokens(model, batches[3])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (loss * scale / 20).backward()
    groups: dict[Block, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(Block(group["block"]), []).append(group)
    return {block.value: cosine for block, cosine in agreement(groups, optimizer).items()}


def measured(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any]) -> dict[str, Any]:
    return measure_directional(model, optimizer, batches, loss_fn=next_tokens).to_dict()


def refused(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any], **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        measure_directional(model, optimizer, batches, loss_fn=next_tokens, **options)
    return str(caught.value)


def two_processes(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    batches = share_of(rank, whole_batches())
    found: dict[str, Any] = {}
    ddp = DistributedDataParallel(split())
    found["ddp"] = measured(ddp, after_steps(ddp, batches, 2.0), batches)
    sharded = fully_sharded(split())
    optimizer = after_steps(sharded, batches, 2.0)
    found["fsdp"] = measured(sharded, optimizer, batches)
    found["cosines ddp"] = cosines(DistributedDataParallel(split()), batches, 2.0)
    found["cosines fsdp"] = cosines(fully_sharded(split()), batches, 2.0)
    found["fsdp again"] = measured(sharded, optimizer, batches)  # nothing was left moved
    found["hessian"] = refused(sharded, optimizer, batches, hessian=True)
    found["uneven"] = refused(sharded, optimizer, batches[: 2 + rank])
    fused = fully_sharded(gpt2(n_layer=2))
    plain = torch.optim.AdamW(fused.parameters(), lr=1e-3)
    found["fused"] = refused(fused, plain, batches)
    half = split().float()
    fully_shard(half, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found["half"] = refused(half, after_steps(half, batches), batches)
    sgd = DistributedDataParallel(split())
    stepped = torch.optim.SGD(param_groups(sgd, lr=1e-3), lr=1e-3, momentum=0.9)
    found["stepped"] = measured(sgd, stepped, batches)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processes")
    spawn(two_processes, (free_port(), str(folder)), 2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    assert second.keys() == first.keys()
    return first


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    report, alone = map(DirectionalReport.from_dict, (found, expected))
    assert report.samples == alone.samples
    assert report.keys() == alone.keys()
    for block, slope in alone.items():
        assert report[block].signal == pytest.approx(slope.signal, rel=1e-6, abs=1e-9)
        assert report[block].curvature == pytest.approx(slope.curvature, rel=1e-5)
        assert report[block].signal_stderr == pytest.approx(slope.signal_stderr, rel=1e-6, abs=1e-9)
        assert (report[block].lr, report[block].numel) == (slope.lr, slope.numel)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp again"])
def test_two_processes_find_what_one_finds(found, kind):
    model = split()
    same(found[kind], measured(model, after_steps(model, whole_batches()), whole_batches()))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_cosines_of_auto_are_those_of_one_process(found, kind):
    alone = cosines(split(), whole_batches())
    assert len(alone) == 6
    assert found[f"cosines {kind}"] == pytest.approx(alone, rel=1e-6)


def test_an_update_seen_in_a_step_is_that_of_all_processes_together(found):
    model = split()
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-3), lr=1e-3, momentum=0.9)
    same(found["stepped"], measured(model, optimizer, whole_batches()))


def test_what_cannot_be_measured_sharded_is_refused(found):
    assert found["hessian"].startswith("hessian=True needs whole parameters")
    assert "call split_fused(model) before fully_shard" in found["fused"]
    assert "computes in half precision, and not because of the parameters alone" in found["half"]
    assert "processes have more than" in found["uneven"]
