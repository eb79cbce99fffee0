"""Real attention classes at head counts, key-value heads and head sizes drawn at random: split where they split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from blockwise_lr.blocks import classify, merge_fused, split_fused
from support.architectures import tiny_config
from support.by_function import moved_by, problems
from support.proofs import vary

pytestmark = pytest.mark.filterwarnings("ignore")

Sizes = Callable[[int, int, int, bool], dict[str, Any]]
"""From key-value heads, queries to each of them, the size of a head and a choice, the settings of a model type."""


def _equal(kv: int, group: int, size: int, choice: bool) -> dict[str, Any]:
    """As many keys as queries."""
    return {"hidden_size": kv * group * size, "num_attention_heads": kv * group}


def _grouped(kv: int, group: int, size: int, choice: bool) -> dict[str, Any]:
    return {**_equal(kv, group, size, choice), "num_key_value_heads": kv}


def _wide(kv: int, group: int, size: int, choice: bool) -> dict[str, Any]:
    """Heads that together are wider, or narrower, than the model."""
    return {**_grouped(kv, group, size, choice), "head_dim": size, "hidden_size": 36}


def _falcon(kv: int, group: int, size: int, choice: bool) -> dict[str, Any]:
    keys = kv if choice else kv * group  # grouped in the new architecture only
    decoder = {"new_decoder_architecture": choice, "multi_query": kv == 1, "num_kv_heads": keys}
    return {**_equal(kv, group, size, choice), **decoder, "alibi": False, "bias": choice}


def _mpt(kv: int, group: int, size: int, choice: bool) -> dict[str, Any]:
    return {"d_model": kv * group * size, "n_heads": kv * group}


def _bigcode(kv: int, group: int, size: int, choice: bool) -> dict[str, Any]:
    return {"n_embd": kv * group * size, "n_head": kv * group, "multi_query": choice}


def _codegen(kv: int, group: int, size: int, choice: bool) -> dict[str, Any]:
    heads = 4 * kv  # so many shards
    return {"n_embd": heads * size, "n_head": heads, "rotary_dim": size}


def _latent(kv: int, group: int, size: int, choice: bool) -> dict[str, Any]:
    parts = {
        "qk_rope_head_dim": size,
        "qk_nope_head_dim": 2 * size,
        "v_head_dim": size + 2,
        "kv_lora_rank": 6,
    }
    heads = {"num_attention_heads": kv * group, "num_key_value_heads": kv * group, "head_dim": size}
    return {**heads, **parts, "qk_head_dim": 3 * size, "q_lora_rank": 10 if choice else None}


def _delta(kv: int, group: int, size: int, choice: bool) -> dict[str, Any]:
    linear = {"linear_num_key_heads": kv, "linear_num_value_heads": kv * group}
    return {
        **_wide(kv, group, size, choice),
        **linear,
        "linear_key_head_dim": size,
        "linear_value_head_dim": 6,
    }


FAMILIES: dict[str, Sizes] = {
    "gpt_neox": _equal,
    "bloom": lambda *s: {"hidden_size": s[0] * s[1] * s[2], "n_head": s[0] * s[1]},
    "persimmon": _equal,
    "falcon": _falcon,
    "mpt": _mpt,
    "gpt_bigcode": _bigcode,
    "codegen": _codegen,
    "phi3": _grouped,
    "llama": _wide,
    "deepseek_v3": _latent,
    "qwen3_next": _delta,
}


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=8)
@given(
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from([4, 8, 12]),
    choice=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_model_of_any_size_is_split_where_it_splits_itself(
    family: str, kv: int, group: int, size: int, choice: bool, seed: int
) -> None:
    config = tiny_config(family)
    for name, value in FAMILIES[family](kv, group, size, choice).items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    config = type(config)(**config.to_dict())
    torch.manual_seed(seed)
    model = vary(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(3, 90, (3, 7))
    with torch.no_grad():
        output = model(tokens).logits
        assert torch.equal(split_fused(model)(tokens).logits, output)
    blocks = classify(model)
    proof = moved_by(model, blocks, lambda: model(tokens, use_cache=False))
    assert proof.attentions
    assert problems(blocks, proof) == []
    after = merge_fused(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
