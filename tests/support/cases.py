"""Tiny models with the block of every parameter written out by hand.

A case says what `classify` must answer, and what it must answer after `split_fused`. To add an architecture,
add a case here (or, of a model written by hand, in tests/support/handwritten_cases.py) and, if it needs one, a line in
`blocks/rules.py`, `blocks/name_rules.py` or `blocks/attention_names.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.case import CONTEXT, NORM_PAIR, QKV_PARTS, VOCAB, WIDTH, Case, prefixed
from support.handwritten_cases import HANDWRITTEN
from support.nano import NanoGPT, TitanLlama

# Models ---------------------------------------------------------------------------------


def gpt2(**settings: object) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": WIDTH, "n_head": 2, "n_layer": 1, "vocab_size": VOCAB, "n_positions": CONTEXT}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **special, **settings})).eval()


def llama(**settings: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "intermediate_size": 20, **settings})).eval()


def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
    }
    return Phi3ForCausalLM(Phi3Config(num_hidden_layers=1, vocab_size=VOCAB, pad_token_id=0, **sizes)).eval()


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, vocab_size=VOCAB, **sizes, **experts)).eval()


def _run_encoder(model: nn.Module) -> Tensor:
    return model(torch.randn(2, 5, WIDTH))


def _run_decoder(model: nn.Module) -> Tensor:
    return model(torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH))


def _run_attention(model: nn.Module) -> Tensor:
    q, k, v = torch.randn(2, 5, WIDTH), torch.randn(2, 7, 6), torch.randn(2, 7, 10)
    return model(q, k, v)[0]


# Blocks ---------------------------------------------------------------------------------

_GPT2_LAYER = {
    "ln_1.weight": "norm",
    "ln_1.bias": "norm",
    "attn.c_attn.weight": "qkv",
    "attn.c_attn.bias": "qkv",
    "attn.c_proj.weight": "vo",
    "attn.c_proj.bias": "vo",
    "ln_2.weight": "norm",
    "ln_2.bias": "norm",
    "mlp.c_fc.weight": "ffn",
    "mlp.c_fc.bias": "ffn",
    "mlp.c_proj.weight": "ffn",
    "mlp.c_proj.bias": "ffn",
}
_GPT2 = {
    "transformer.wte.weight": "emb",
    "transformer.wpe.weight": "pos",
    **prefixed("transformer.h.0", _GPT2_LAYER),
    "transformer.ln_f.weight": "norm",
    "transformer.ln_f.bias": "norm",
}
_GPT2_SPLIT = {f"transformer.h.0.attn.c_attn.{leaf}": QKV_PARTS for leaf in ("weight", "bias")}
_GPT2_CROSS_LAYER = {
    "crossattention.c_attn.weight": "qkv",
    "crossattention.c_attn.bias": "qkv",
    "crossattention.q_attn.weight": "qk",
    "crossattention.q_attn.bias": "qk",
    "crossattention.c_proj.weight": "vo",
    "crossattention.c_proj.bias": "vo",
    "ln_cross_attn.weight": "norm",
    "ln_cross_attn.bias": "norm",
}

_LLAMA_ATTENTION = {
    "self_attn.q_proj.weight": "qk",
    "self_attn.k_proj.weight": "qk",
    "self_attn.v_proj.weight": "vo",
    "self_attn.o_proj.weight": "vo",
}
_LLAMA_NORMS = {"input_layernorm.weight": "norm", "post_attention_layernorm.weight": "norm"}
_LLAMA_TIED = {
    "model.embed_tokens.weight": "emb",
    **prefixed(
        "model.layers.0",
        {
            **_LLAMA_ATTENTION,
            "mlp.gate_proj.weight": "ffn",
            "mlp.up_proj.weight": "ffn",
            "mlp.down_proj.weight": "ffn",
            **_LLAMA_NORMS,
        },
    ),
    "model.norm.weight": "norm",
}

_TORCH_ATTENTION = {
    "in_proj_weight": "qkv",
    "in_proj_bias": "qkv",
    "out_proj.weight": "vo",
    "out_proj.bias": "vo",
}
_TORCH_FEED_FORWARD = {
    "linear1.weight": "ffn",
    "linear1.bias": "ffn",
    "linear2.weight": "ffn",
    "linear2.bias": "ffn",
}

_NANO = {
    "transformer.wte.weight": "emb",
    "transformer.wpe.weight": "pos",
    **prefixed(
        "transformer.h.0", {k: b for k, b in _GPT2_LAYER.items() if not k.startswith("ln") or "weight" in k}
    ),
    "transformer.ln_f.weight": "norm",
}

CASES: tuple[Case, ...] = (
    Case("gpt2", gpt2, _GPT2, _GPT2_SPLIT),
    Case(
        "gpt2-untied",
        lambda: gpt2(tie_word_embeddings=False),
        {**_GPT2, "lm_head.weight": "head"},
        _GPT2_SPLIT,
    ),
    Case(
        "gpt2-cross-attention",
        lambda: gpt2(add_cross_attention=True),
        {**_GPT2, **prefixed("transformer.h.0", _GPT2_CROSS_LAYER)},
        {
            **_GPT2_SPLIT,
            "transformer.h.0.crossattention.c_attn.weight": ["qk", "vo"],
            "transformer.h.0.crossattention.c_attn.bias": ["qk", "vo"],
        },
        lambda model: model(torch.arange(4)[None], encoder_hidden_states=torch.randn(1, 3, WIDTH)).logits,
    ),
    Case("llama", llama, {**_LLAMA_TIED, "lm_head.weight": "head"}),
    Case("llama-tied-gqa", lambda: llama(tie_word_embeddings=True, num_key_value_heads=2), _LLAMA_TIED),
    Case(
        "phi3-gqa",
        phi3,
        {
            "model.embed_tokens.weight": "emb",
            **prefixed(
                "model.layers.0",
                {
                    "self_attn.o_proj.weight": "vo",
                    "self_attn.qkv_proj.weight": "qkv",
                    "mlp.gate_up_proj.weight": "ffn",
                    "mlp.down_proj.weight": "ffn",
                    **_LLAMA_NORMS,
                },
            ),
            "model.norm.weight": "norm",
            "lm_head.weight": "head",
        },
        {"model.layers.0.self_attn.qkv_proj.weight": QKV_PARTS},
    ),
    Case(
        "mixtral",
        mixtral,
        {
            "model.embed_tokens.weight": "emb",
            **prefixed(
                "model.layers.0",
                {
                    **_LLAMA_ATTENTION,
                    "mlp.gate.weight": "router",
                    "mlp.experts.gate_up_proj": "ffn",
                    "mlp.experts.down_proj": "ffn",
                    **_LLAMA_NORMS,
                },
            ),
            "model.norm.weight": "norm",
            "lm_head.weight": "head",
        },
    ),
    Case(
        "torch-encoder-layer",
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 20, batch_first=True, dropout=0.0),
        {
            **prefixed("self_attn", _TORCH_ATTENTION),
            **_TORCH_FEED_FORWARD,
            **prefixed("norm1", NORM_PAIR),
            **prefixed("norm2", NORM_PAIR),
        },
        {"self_attn.in_proj_weight": QKV_PARTS, "self_attn.in_proj_bias": QKV_PARTS},
        _run_encoder,
    ),
    Case(
        "torch-decoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 20, 0.0, batch_first=True), 1),
        prefixed(
            "layers.0",
            {
                **prefixed("self_attn", _TORCH_ATTENTION),
                **prefixed("multihead_attn", _TORCH_ATTENTION),
                **_TORCH_FEED_FORWARD,
                **prefixed("norm1", NORM_PAIR),
                **prefixed("norm2", NORM_PAIR),
                **prefixed("norm3", NORM_PAIR),
            },
        ),
        {
            f"layers.0.{attention}.{leaf}": QKV_PARTS
            for attention in ("self_attn", "multihead_attn")
            for leaf in ("in_proj_weight", "in_proj_bias")
        },
        _run_decoder,
    ),
    Case(
        "torch-attention-of-three-widths",
        lambda: nn.MultiheadAttention(WIDTH, 2, kdim=6, vdim=10, add_bias_kv=True, batch_first=True),
        {
            "q_proj_weight": "qk",
            "k_proj_weight": "qk",
            "v_proj_weight": "vo",
            "in_proj_bias": "qkv",
            "bias_k": "qk",
            "bias_v": "vo",
            "out_proj.weight": "vo",
            "out_proj.bias": "vo",
        },
        {"in_proj_bias": QKV_PARTS},
        _run_attention,
    ),
    Case(
        "nanogpt",
        NanoGPT,
        _NANO,
        {f"transformer.h.0.attn.c_attn.{leaf}": QKV_PARTS for leaf in ("weight", "bias")},
    ),
    Case(
        "nanogpt-gqa-without-biases",
        lambda: NanoGPT(kv_heads=1, bias=False, tied=False),
        {**{name: block for name, block in _NANO.items() if "bias" not in name}, "lm_head.weight": "head"},
        {"transformer.h.0.attn.c_attn.weight": QKV_PARTS},
    ),
    Case(
        "torchtitan-llama",
        TitanLlama,
        {
            "tok_embeddings.weight": "emb",
            **prefixed(
                "layers.0",
                {
                    "attention.wq.weight": "qk",
                    "attention.wk.weight": "qk",
                    "attention.wv.weight": "vo",
                    "attention.wo.weight": "vo",
                    "feed_forward.w1.weight": "ffn",
                    "feed_forward.w2.weight": "ffn",
                    "feed_forward.w3.weight": "ffn",
                    "attention_norm.weight": "norm",
                    "ffn_norm.weight": "norm",
                },
            ),
            "norm.weight": "norm",
            "output.weight": "head",
        },
    ),
    *HANDWRITTEN,
)

FUSED_CASES = tuple(case for case in CASES if case.split)
