"""Tiny models on the meta device, and what the block map says about their learning rates."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from blockwise_lr import Block, classify

_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
RATIOS = {
    "emb": 16.0,
    "qk": 4.0,
    "ffn": 1.5,
    "vo": 0.5,
    "norm": 32.0,
    "head": 12.0,
    "pos": 2.0,
    "router": 3.0,
}
"""A different ratio for each block, and none of them 1."""

MODELS = ("gpt2", "llama", "mixtral", "phi3")
"""phi3 has a fused qkv_proj, and gpt2 a fused c_attn with biases."""


def tiny(name: str, device: str = "meta") -> nn.Module:
    """Return a model of transformers; those on the meta device are made once and copied."""
    return copy.deepcopy(_on_meta(name)) if device == "meta" else _made(name, device)


@functools.cache
def _on_meta(name: str) -> nn.Module:
    return _made(name, "meta")


def _made(name: str, device: str) -> nn.Module:
    with torch.device(device):
        if name == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=40,
                    n_positions=12,
                    n_embd=8,
                    n_layer=2,
                    n_head=2,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            )
        if name == "llama":
            return LlamaForCausalLM(LlamaConfig(**_SIZES))
        if name == "mixtral":
            return MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=2))
        return Phi3ForCausalLM(Phi3Config(**_SIZES))


def expected_ratios(model: nn.Module, ratios: dict[str, float] = RATIOS) -> dict[str, float]:
    """Return the ratio of each parameter; a fused weight has the lower of its parts'."""
    fused = min(ratios.get("qk", 1.0), ratios.get("vo", 1.0))
    return {
        name: fused if block is Block.QKV else ratios.get(block.value, 1.0)
        for name, block in classify(model).items()
    }
