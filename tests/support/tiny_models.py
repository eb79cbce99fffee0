"""Tiny models of transformers' own classes, with weights drawn from a seed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from blockwise_lr import split_fused

GPT2 = {"vocab_size": 40, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def gpt2(
    *, seed: int = 0, split: bool = False, dropout: float | None = None, **settings: Any
) -> GPT2LMHeadModel:
    """A GPT-2 of about two thousand parameters.

    Args:
        seed: of the weights.
        split: split the fused weights.
        dropout: of residuals, embeddings and attention; None: GPT-2's own, 0.1.
        settings: of its configuration, in the place of those in GPT2.
    """
    torch.manual_seed(seed)
    if dropout is not None:
        settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = GPT2LMHeadModel(GPT2Config(**GPT2 | settings))
    return split_fused(model) if split else model


def llama(*, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A LLaMA of about six thousand parameters, with an untied head; `settings` replace those in LLAMA."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**LLAMA | settings))
