"""What a directional measurement costs in memory, and that nothing of it is left behind, even after an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwise_lr import AdamMini, Block, measure_directional, param_groups, split_fused
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from support import tiny_models
from support.peak_memory import allocated

BATCH = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}


def stepped(model: nn.Module, kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """An optimizer that has taken one step, and gradients of another batch."""
    optimizer = kind(param_groups(model, lr=1e-3), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, pytest.param(AdamMini, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_measurement_takes_at_most_5_bytes_a_parameter(dtype, kind, checkpointing) -> None:
    """Its own gradients included. Two million parameters, and only eight tokens."""
    shape = ModelConfig("llama", hidden_size=128, layers=8, heads=4, vocab_size=256, context=16)
    model = split_fused(build_model(shape, seed=0)).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = stepped(model, kind)
    numel = sum(parameter.numel() for parameter in model.parameters())
    memory = allocated(lambda: measure_directional(model, optimizer, BATCH))
    assert memory.peak < 5 * numel
    assert memory.peak > 4 * numel  # one copy of the parameters: the records are there
    assert memory.left < 0.01 * numel
    assert any(getattr(each, "gradient_checkpointing", False) for each in model.modules()) is checkpointing


class BreaksAtCall(nn.Module):
    """A model whose forward pass raises at the n-th call, in which the parameters may have been moved."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls, self.last = model, 0, 0

    def forward(self, **batch: Tensor) -> Any:
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        return self.model(**batch)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    gradients = [parameter.grad for parameter in model.parameters()]
    state = {"model": dict(model.named_parameters()), "optimizer": optimizer.state_dict()}
    return copy.deepcopy([state, gradients, torch.get_rng_state(), [m.training for m in model.modules()]])


def same(a: Any, b: Any) -> bool:
    flat_a, flat_b = map(torch.utils._pytree.tree_leaves, (a, b))
    return len(flat_a) == len(flat_b) and all(
        torch.equal(x, y) and x.dtype is y.dtype if isinstance(x, Tensor) else x == y
        for x, y in zip(flat_a, flat_b)
    )


CALLS = 1 + 2 * 6 + 1
"""Forward passes of one batch: with a graph, two for each of the six blocks of a GPT-2, and one for the rounding."""


@pytest.mark.parametrize(
    "last", [1, CALLS, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2, 3, 9, CALLS + 1, CALLS + 4))]
)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamMini, torch.optim.SGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everything_is_restored_to_the_bit_after_an_error_at_any_forward_pass(dtype, kind, last) -> None:
    model = BreaksAtCall(tiny_models.gpt2(seed=1, split=True, tie_word_embeddings=False).to(dtype)).train()
    optimizer = stepped(model, kind)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    before, gradients = snapshot(model, optimizer), [parameter.grad for parameter in model.parameters()]
    model.calls, model.last = 0, last
    if last:
        with pytest.raises(KeyboardInterrupt):
            measure_directional(model, optimizer, [BATCH] * 4)
    else:
        report = measure_directional(model, optimizer, [BATCH] * 4)
        assert len(report) == 7  # and the positions
    assert same(snapshot(model, optimizer), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients))
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_everything_is_restored_after_an_error_in_the_backward_pass() -> None:
    model = tiny_models.llama(seed=1).train()
    optimizer = stepped(model, torch.optim.AdamW)
    before = snapshot(model, optimizer)

    def broken(gradient: Tensor) -> Tensor:
        raise MemoryError

    hook = model.model.layers[0].mlp.up_proj.weight.register_hook(broken)
    with pytest.raises(MemoryError):
        measure_directional(model, optimizer, BATCH)
    hook.remove()
    assert same(snapshot(model, optimizer), before)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert Block.FFN in measure_directional(model, optimizer, BATCH)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_stays_on_and_activations_take_no_more_than_in_a_training_step(reentrant) -> None:
    """Twelve layers on 8 x 128 tokens, so that activations are nearly all memory."""
    model = tiny_models.llama(
        hidden_size=64, intermediate_size=176, num_hidden_layers=12, max_position_embeddings=128
    ).train()
    ids = torch.randint(40, (8, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    optimizer = stepped(model, torch.optim.AdamW)
    optimizer.zero_grad()
    whole = allocated(lambda: model(**batch).loss.backward()).peak
    optimizer.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    training = allocated(lambda: model(**batch).loss.backward()).peak
    optimizer.zero_grad()
    found = allocated(lambda: measure_directional(model, optimizer, batch)).peak
    assert training < 0.5 * whole
    copy_and_gradients = 5 * sum(parameter.numel() for parameter in model.parameters())
    logits = 7 * 8 * 128 * 40 * 4  # one change of the logits for each block, and the products of a chunk
    assert found < training + copy_and_gradients + logits
