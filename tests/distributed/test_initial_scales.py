"""The initial scales of a model whose weights are sharded over two processes are those of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from blockwise_lr import Block, initial_scales
from support.processes import free_port, spawn
from support.several_processes import wrapped
from support.tiny_models import llama


def large() -> nn.Module:
    """A model whose embedding grows with its rows, so that each process has another scale."""
    model = llama(hidden_size=32, intermediate_size=64)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight *= torch.linspace(1, 9, weight.shape[0])[:, None]
    return model


def compare(rank: int, port: int) -> None:
    distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    try:
        whole = initial_scales(large())
        assert initial_scales(wrapped(large(), "fsdp")) == whole
        mesh = init_device_mesh("cpu", (2,))
        model = large()
        for name, module in model.named_modules():
            placement = Shard(0) if name.endswith("embed_tokens") else Replicate()
            for own, parameter in list(module.named_parameters(recurse=False)):
                cut = distribute_tensor(parameter.detach(), mesh, [placement])
                setattr(module, own, nn.Parameter(cut))
        assert isinstance(model.get_input_embeddings().weight, DTensor)
        assert initial_scales(model)[Block.EMB] == whole[Block.EMB]
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_weights_have_the_scales_of_the_whole():
    spawn(compare, (free_port(),), 2)
