"""Build GPT-2 and LLaMA models of any size from transformers' own classes."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from blockwise_lr.errors import UserError
from blockwise_lr.train.config import ModelConfig

LARGEST = 2**31 - 1
"""The largest size or count that a configuration may have. Above it, torch and numpy overflow."""


def build_model(config: ModelConfig, *, seed: int) -> PreTrainedModel:
    """Build a newly initialised model in fp32 without dropout. The same seed gives the same weights.

    The feed-forward width is 4 times the hidden size by default, as in the paper (arXiv 2502.19002). GPT-2 keeps
    transformers' biases; the paper's GPT-2 has none.

    Args:
        config: family and sizes of the model.
        seed: seed of the initial weights.

    Raises:
        UserError: a size is out of range, a width is not divisible as needed, or GPT-2 has a LLaMA-only setting.

    Example:
        >>> build_model(ModelConfig(hidden_size=32, layers=1, vocab_size=64), seed=0).num_parameters()
        20576
    """
    for name in ("hidden_size", "layers", "heads", "kv_heads", "ffn_size", "vocab_size"):
        size = getattr(config, name)
        if size is not None and not 1 <= size <= LARGEST:
            raise UserError(
                f"--{name.replace('_', '-')} is {size}; expected 1 or more"
                + (size > 0) * f", {LARGEST} at most"
            )
    if config.hidden_size % config.heads:
        raise UserError(
            f"hidden size {config.hidden_size} is not a multiple of {config.heads} heads: "
            f"change --hidden-size or --heads"
        )
    ffn_size = 4 * config.hidden_size if config.ffn_size is None else config.ffn_size
    kv_heads = config.heads if config.kv_heads is None else config.kv_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.family == "gpt2":
            if kv_heads != config.heads:
                raise UserError(
                    "GPT-2 has as many key/value heads as heads: leave out --kv-heads, or use --family llama"
                )
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=config.vocab_size,
                    n_positions=config.context,
                    n_embd=config.hidden_size,
                    n_layer=config.layers,
                    n_head=config.heads,
                    n_inner=ffn_size,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    bos_token_id=None,
                    eos_token_id=None,
                    tie_word_embeddings=config.tied,
                    use_cache=False,
                )
            )
        if config.heads % kv_heads:
            raise UserError(
                f"{config.heads} heads cannot share {kv_heads} key/value heads: --kv-heads must divide --heads"
            )
        if (width := config.hidden_size // config.heads) % 2:
            raise UserError(
                f"{config.hidden_size} channels in {config.heads} heads are {width} a head: LLaMA's rotary positions "
                "turn them in pairs; change --hidden-size or --heads"
            )
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                max_position_embeddings=config.context,
                hidden_size=config.hidden_size,
                intermediate_size=ffn_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=kv_heads,
                bos_token_id=None,
                eos_token_id=None,
                tie_word_embeddings=config.tied,
                use_cache=False,
            )
        )


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of :func:`build_model`'s model, without allocating it. A tied head counts once.

    Example:
        >>> count_parameters(ModelConfig(hidden_size=32, layers=1, vocab_size=64))
        20576
    """
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config, seed=0).parameters())
