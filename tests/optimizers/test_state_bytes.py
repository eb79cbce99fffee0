"""What "half of AdamW's state" is in bytes, by the type of the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from blockwise_lr import AdamMini, param_groups, split_fused


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


@pytest.mark.parametrize(
    ("dtype", "adamw_bytes", "ratio"),
    [
        (torch.float32, 8, 0.50),
        (torch.bfloat16, 4, 1.01),
        (torch.float16, 4, 1.01),
        (torch.float64, 16, 0.50),
    ],
)
def test_adam_mini_halves_the_state_of_float32_parameters_and_of_no_half_precision_ones(
    dtype: torch.dtype, adamw_bytes: int, ratio: float
) -> None:
    config = GPT2Config(n_layer=2, n_head=4, n_embd=256, vocab_size=1000, n_positions=64)
    model = split_fused(GPT2LMHeadModel(config)).to(dtype)
    count = sum(p.numel() for p in model.parameters())
    sizes = {}
    for name, kind in (("adamw", torch.optim.AdamW), ("adam-mini", AdamMini)):
        optimizer = kind(param_groups(model, 1e-3, {}), lr=1e-3)  # type: ignore[operator]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        sizes[name] = state_bytes(optimizer)
    assert sizes["adamw"] / count == pytest.approx(adamw_bytes, rel=1e-3)
    assert round(sizes["adam-mini"] / sizes["adamw"], 2) == ratio
