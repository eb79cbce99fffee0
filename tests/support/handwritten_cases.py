"""The blocks of the models in tests/handwritten.py, written out."""

from __future__ import annotations

import torch

from support.case import NORM_PAIR, QKV_PARTS, Case, prefixed
from support.handwritten import CausalSelfAttention, ChatGPT, HyenaLM, LitGPT, VisionTransformer
from support.handwritten_parallel import GPT, MegatronGPT, StackedAttention
from support.handwritten_vision import Cait, Hiera, Levit

_LINEAR = {kind: {"weight": kind, "bias": kind} for kind in ("qkv", "vo", "ffn", "conv", "ssm", "head")}
_VISION_MLP = {**prefixed("mlp.fc1", _LINEAR["ffn"]), **prefixed("mlp.fc2", _LINEAR["ffn"])}


def _litgpt(attention: dict[str, str]) -> dict[str, str]:
    return {
        "lm_head.weight": "head",
        "transformer.wte.weight": "emb",
        **prefixed(
            "transformer.h.0",
            {
                "norm_1.weight": "norm",
                **prefixed("attn", attention),
                "norm_2.weight": "norm",
                "mlp.fc_1.weight": "ffn",
                "mlp.fc_2.weight": "ffn",
                "mlp.proj.weight": "ffn",
            },
        ),
        "transformer.ln_f.weight": "norm",
    }


def _modded(attention: dict[str, str]) -> dict[str, str]:
    return {
        "scalars": "other",
        "embed.weight": "emb",
        "value_embeds.0.weight": "emb",
        "smear_gate.weight": "other",
        "skip_gate.weight": "other",
        **prefixed(
            "blocks.0",
            {"lambdas": "other", **prefixed("attn", attention), "mlp.c_fc": "ffn", "mlp.c_proj": "ffn"},
        ),
        "lm_head.weight": "head",
    }


HANDWRITTEN: tuple[Case, ...] = (
    Case(
        "timm-vision-transformer",
        VisionTransformer,
        {
            "cls_token": "emb",
            "pos_embed": "pos",
            **prefixed("patch_embed.proj", _LINEAR["conv"]),
            **prefixed(
                "blocks.0",
                {
                    **prefixed("norm1", NORM_PAIR),
                    **prefixed("attn.qkv", _LINEAR["qkv"]),
                    **prefixed("attn.q_norm", NORM_PAIR),
                    **prefixed("attn.k_norm", NORM_PAIR),
                    **prefixed("attn.proj", _LINEAR["vo"]),
                    "ls1.gamma": "other",
                    **prefixed("norm2", NORM_PAIR),
                    **_VISION_MLP,
                    "ls2.gamma": "other",
                },
            ),
            **prefixed("norm", NORM_PAIR),
            **prefixed("head", _LINEAR["head"]),
        },
        {f"blocks.0.attn.qkv.{leaf}": QKV_PARTS for leaf in ("weight", "bias")},
        lambda model: model(torch.randn(2, 3, 8, 8)),
    ),
    Case(
        "nanochat",
        ChatGPT,
        {
            "resid_lambdas": "other",
            "x0_lambdas": "other",
            "smear_lambda": "other",
            "transformer.wte.weight": "emb",
            **prefixed(
                "transformer.h.0",
                {
                    "attn.c_q.weight": "qk",
                    "attn.c_k.weight": "qk",
                    "attn.c_v.weight": "vo",
                    "attn.c_proj.weight": "vo",
                    "attn.ve_gate.weight": "vo",
                    "mlp.c_fc.weight": "ffn",
                    "mlp.c_proj.weight": "ffn",
                },
            ),
            "lm_head.weight": "head",
            "value_embeds.0.weight": "emb",
            "smear_gate.weight": "other",
        },
    ),
    Case(
        "litgpt",
        LitGPT,
        _litgpt({"qkv.weight": "qkv", "proj.weight": "vo"}),
        {"transformer.h.0.attn.qkv.weight": QKV_PARTS},
    ),
    Case(
        "litgpt-group-by-group",
        lambda: LitGPT(CausalSelfAttention),
        _litgpt({**prefixed("attn", _LINEAR["qkv"]), **prefixed("proj", _LINEAR["vo"])}),
        {f"transformer.h.0.attn.attn.{leaf}": QKV_PARTS for leaf in ("weight", "bias")},
    ),
    Case(
        "hyena",
        HyenaLM,
        {
            "embed.weight": "emb",
            **prefixed(
                "layers.0",
                {
                    **prefixed("norm1", NORM_PAIR),
                    **prefixed("mixer.in_proj", _LINEAR["ssm"]),
                    **prefixed("mixer.out_proj", _LINEAR["ssm"]),
                    **prefixed("mixer.short_filter", _LINEAR["conv"]),
                    "mixer.filter_fn.bias": "ssm",
                    **prefixed("mixer.filter_fn.implicit_filter.0", _LINEAR["ssm"]),
                    "mixer.filter_fn.implicit_filter.1.freq": "ssm",
                    "mixer.filter_fn.implicit_filter.2.weight": "ssm",
                    **prefixed("norm2", NORM_PAIR),
                    **_VISION_MLP,
                },
            ),
            **prefixed("norm", NORM_PAIR),
        },
    ),
    Case(
        "megatron",
        MegatronGPT,
        {
            "embedding.word_embeddings.weight": "emb",
            "embedding.position_embeddings.weight": "pos",
            **prefixed(
                "decoder.layers.0",
                {
                    **prefixed("input_layernorm", NORM_PAIR),
                    **prefixed("self_attention.linear_proj", _LINEAR["vo"]),
                    **prefixed("self_attention.linear_qkv", _LINEAR["qkv"]),
                    **prefixed("pre_mlp_layernorm", NORM_PAIR),
                    **prefixed("mlp.linear_fc1", _LINEAR["ffn"]),
                    **prefixed("mlp.linear_fc2", _LINEAR["ffn"]),
                },
            ),
            **prefixed("decoder.final_layernorm", NORM_PAIR),
            **prefixed("output_layer", _LINEAR["head"]),
        },
        {f"decoder.layers.0.self_attention.linear_qkv.{leaf}": QKV_PARTS for leaf in ("weight", "bias")},
    ),
    Case(
        "modded-nanogpt",
        GPT,
        _modded({"qkvo_w": "qkv", "attn_gate.weight": "vo"}),
        {"blocks.0.attn.qkvo_w": ["qk", "qk", "vo", "vo"]},
    ),
    Case(
        "modded-nanogpt-before",
        lambda: GPT(StackedAttention),
        _modded({"qkv_w": "qkv", "lambdas": "other", "c_proj.weight": "vo"}),
        {"blocks.0.attn.qkv_w": QKV_PARTS},
    ),
    Case(
        "timm-levit",
        Levit,
        {
            **prefixed("stem.proj", _LINEAR["conv"]),
            "stages.0.attn.attention_biases": "pos",
            "stages.0.attn.qkv.linear.weight": "qkv",
            **prefixed("stages.0.attn.qkv.bn", NORM_PAIR),
            "stages.0.attn.proj.1.linear.weight": "vo",
            **prefixed("stages.0.attn.proj.1.bn", NORM_PAIR),
            "stages.0.mlp.ln1.linear.weight": "ffn",
            **prefixed("stages.0.mlp.ln1.bn", NORM_PAIR),
            "stages.0.mlp.ln2.linear.weight": "ffn",
            **prefixed("stages.0.mlp.ln2.bn", NORM_PAIR),
            **prefixed("head.bn", NORM_PAIR),
            **prefixed("head.linear", _LINEAR["head"]),
            **prefixed("head_dist.bn", NORM_PAIR),
            **prefixed("head_dist.linear", _LINEAR["head"]),
        },
        {"stages.0.attn.qkv.linear.weight": QKV_PARTS},
        lambda model: model.eval()(torch.randn(2, 3, 8, 8)),
    ),
    Case(
        "timm-hiera",
        Hiera,
        {
            "pos_embed": "pos",
            **prefixed("patch_embed.proj", _LINEAR["conv"]),
            **prefixed(
                "blocks.0",
                {
                    **prefixed("norm1", NORM_PAIR),
                    **prefixed("attn.qkv", _LINEAR["qkv"]),
                    **prefixed("attn.proj", _LINEAR["vo"]),
                    **prefixed("proj", {"weight": "other", "bias": "other"}),
                    **prefixed("norm2", NORM_PAIR),
                    **_VISION_MLP,
                },
            ),
            **prefixed("norm", NORM_PAIR),
            **prefixed("head.fc", _LINEAR["head"]),
        },
        {f"blocks.0.attn.qkv.{leaf}": QKV_PARTS for leaf in ("weight", "bias")},
        lambda model: model(torch.randn(2, 3, 8, 8)),
    ),
    Case(
        "timm-cait",
        Cait,
        {
            "pos_embed": "pos",
            "cls_token_0": "emb",
            **prefixed("patch_embed.proj", _LINEAR["conv"]),
            **prefixed(
                "blocks.0",
                {
                    "gamma_1": "other",
                    "gamma_2": "other",
                    **prefixed("norm1", NORM_PAIR),
                    **prefixed("attn.qkv", _LINEAR["qkv"]),
                    **prefixed("attn.proj", _LINEAR["vo"]),
                    **prefixed("attn.proj_l", {"weight": "other", "bias": "other"}),
                    **prefixed("attn.proj_w", {"weight": "other", "bias": "other"}),
                    **prefixed("norm2", NORM_PAIR),
                    **_VISION_MLP,
                },
            ),
            **prefixed("norm", NORM_PAIR),
            **prefixed("head", _LINEAR["head"]),
        },
        {f"blocks.0.attn.qkv.{leaf}": QKV_PARTS for leaf in ("weight", "bias")},
        lambda model: model(torch.randn(2, 3, 8, 8)),
    ),
)
