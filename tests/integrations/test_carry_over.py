"""A state of other groups is carried over into whatever optimizer loads it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from blockwise_lr import AdamMini, adopt_state, param_groups, split_fused
from blockwise_lr.integrations.carry_over import carry_over_moments


def trained(dtype):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=12, n_embd=8, n_layer=1, n_head=2)).to(
        dtype
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(12)[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamMini])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_a_plain_optimizers_state_is_adopting_it(kind, dtype):
    model, state = trained(dtype)
    split_fused(model)
    adopted, loaded = (kind(param_groups(model, 1e-3), lr=1e-3) for _ in range(2))
    adopt_state(state, model, adopted)
    carry_over_moments(loaded, model, "error", ratios_move=False)
    loaded.load_state_dict(state)
    assert len(loaded.state) == len(adopted.state) == len(list(model.parameters()))
    for parameter, expected in adopted.state.items():
        for key, value in expected.items():
            assert torch.equal(loaded.state[parameter][key].float(), value.float()), key
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    loaded.step()
    assert all(p.isfinite().all() for p in model.parameters())
