"""Blocks keep their names through wrappers, and a split model trains and saves under them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from blockwise_lr.blocks import BlockMap, canonical_name, classify, merge_fused, split_fused
from support.case import VOCAB
from support.nano import NanoBlock, NanoGPT
from support.processes import free_port, spawn


def by_canonical_name(blocks: BlockMap) -> dict[str, str]:
    return {canonical_name(name): block.value for name, block in blocks.items()}


def checkpointed(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, (NanoBlock, nn.Linear)))
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def prepared(model: nn.Module) -> nn.Module:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the settings of one process are one object
    try:
        return Accelerator(cpu=True, dynamo_backend="eager").prepare(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "wrap", [checkpointed, compiled, prepared, lambda model: compiled(checkpointed(model))]
)
def test_wrapping_changes_no_block_and_no_output(wrap, split: bool) -> None:
    torch.manual_seed(0)
    model = split_fused(NanoGPT()) if split else NanoGPT()
    before = classify(model)
    tokens = torch.arange(6)[None]
    output = model(tokens)
    wrapped = wrap(model)
    after = classify(wrapped)
    assert by_canonical_name(after) == by_canonical_name(before)
    assert list(after) != list(before)
    for name, _ in wrapped.named_parameters():  # a map made on either side serves on the other
        assert before[name] is after[canonical_name(name)]
        assert before.reason(name) == after.reason(canonical_name(name))
    assert torch.equal(wrapped(tokens), output)


@pytest.mark.parametrize("wrap", [checkpointed, compiled])
def test_a_wrapped_split_model_has_the_original_state_dict(wrap) -> None:
    torch.manual_seed(0)
    model = NanoGPT()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped = wrap(split_fused(model))
    state = wrapped.state_dict()
    assert {canonical_name(key) for key in state} == set(before)
    assert all(torch.equal(value, before[canonical_name(key)]) for key, value in state.items())
    wrapped.load_state_dict({key: value + 1 for key, value in state.items()})
    assert all(torch.equal(value, before[key] + 1) for key, value in merge_fused(model).state_dict().items())


def test_splitting_after_compiling_is_refused() -> None:
    message = r"already wrapped in OptimizedModule.*call split_fused\(model\) before wrapping it"
    with pytest.raises(ValueError, match=message):
        split_fused(compiled(NanoGPT()))


def test_splitting_inside_activation_checkpointing_works() -> None:
    model = checkpointed(NanoGPT())
    tokens = torch.arange(6)[None]
    before = model(tokens)
    assert torch.equal(split_fused(model)(tokens), before)
    assert by_canonical_name(classify(model)) == by_canonical_name(classify(split_fused(NanoGPT())))


def batches() -> Tensor:
    return torch.randint(VOCAB, (3, 4, 10), generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches():
        optimizer.zero_grad()
        tokens = batch[rows]
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()


def two_processes(rank: int, port: int, out: str) -> None:
    """What each of two gloo processes does; an assertion that fails there fails the test."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole = NanoGPT(layers=2)
    start = {key: value.clone() for key, value in whole.state_dict().items()}

    # DDP: the same blocks, original keys, and the same training as one process's.
    plain = split_fused(NanoGPT(layers=2))
    plain.load_state_dict(start)
    blocks = classify(plain)
    model = DistributedDataParallel(plain)
    assert by_canonical_name(classify(model)) == by_canonical_name(blocks)
    assert all(name.startswith("module.") for name in classify(model))
    train(model, slice(2 * rank, 2 * rank + 2))
    state = model.state_dict()
    assert list(state) == [f"module.{key}" for key in start]
    train(whole, slice(0, 4))
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(state[f"module.{key}"], value)
    model.load_state_dict({f"module.{key}": value for key, value in start.items()})
    assert all(torch.equal(value, start[key]) for key, value in plain.state_dict().items())
    train(model, slice(2 * rank, 2 * rank + 2))
    if rank == 0:
        torch.save(plain.state_dict(), out)
    with pytest.raises(ValueError, match="already wrapped in DistributedDataParallel"):
        split_fused(DistributedDataParallel(NanoGPT()))

    # The same through accelerate.
    from accelerate import Accelerator

    launched = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in launched.items()})
    prepared = Accelerator(cpu=True).prepare(split_fused(NanoGPT(layers=2)))
    assert isinstance(prepared, DistributedDataParallel)
    assert by_canonical_name(classify(prepared)) == by_canonical_name(blocks)

    # FSDP2: the same blocks; sharded parts keep the split layout, and say so when asked for another.
    sharded = split_fused(NanoGPT(layers=2))
    sharded.load_state_dict(start)
    for layer in sharded.transformer.h:
        fully_shard(layer)
    fully_shard(sharded)
    assert all(isinstance(param, DTensor) for param in sharded.parameters())
    assert by_canonical_name(classify(sharded)) == by_canonical_name(blocks)
    train(sharded, slice(2 * rank, 2 * rank + 2))
    assert "transformer.h.0.attn.c_attn.parametrizations.weight.original2" in sharded.state_dict()
    full = {key: value.full_tensor() for key, value in sharded.state_dict().items()}
    exported = split_fused(NanoGPT(layers=2))
    exported.load_state_dict(full)
    for key, value in merge_fused(exported).state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key])
    with pytest.raises(RuntimeError, match="is split and sharded: its parts load in the split layout only"):
        sharded.load_state_dict(start)
    with pytest.raises(ValueError, match=r"c_attn\.weight is sharded .* cannot be merged in place"):
        merge_fused(sharded)
    # torchtitan's order: initialised after the split and the sharding; all processes have what the first one drew.
    with torch.device("meta"):
        made = split_fused(NanoGPT())
    fully_shard(made)
    made.to_empty(device="cpu")
    torch.manual_seed(rank)
    layer = made.transformer.h[0].attn.c_attn
    nn.init.normal_(layer.weight)
    layer.bias.data.fill_(2)
    layer.bias.data += 1
    torch.manual_seed(0)
    expected = torch.empty(24, 8).normal_()
    names = [f"original{i}" for i in range(3)]
    parts = [getattr(layer.parametrizations.weight, name).full_tensor() for name in names]
    assert torch.equal(torch.cat(parts), expected)
    assert all((getattr(layer.parametrizations.bias, name).full_tensor() == 3).all() for name in names)
    assert torch.equal(layer.weight, expected)

    late = NanoGPT()
    fully_shard(late)
    with pytest.raises(
        ValueError, match=r"c_attn\.weight: it is sharded .*: call split_fused before fully_shard"
    ):
        split_fused(late)
    distributed.destroy_process_group()


def test_two_processes_keep_blocks_training_and_checkpoints(tmp_path: Path) -> None:
    spawn(two_processes, (free_port(), str(tmp_path / "state.pt")), 2)
    NanoGPT(layers=2).load_state_dict(torch.load(tmp_path / "state.pt"))


def test_an_attribute_of_your_own_called_module_is_no_wrapper():
    from blockwise_lr.blocks import canonical_name

    assert canonical_name("adapter.module.weight") == "adapter.module.weight"
    assert canonical_name("_orig_mod.module.adapter.module.weight") == "adapter.module.weight"
