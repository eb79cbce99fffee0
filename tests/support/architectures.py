"""Tiny configurations of every causal language model that the installed transformers release knows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

CAUSAL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_NAMES = {
    32: "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size lru_width attention_hidden_size "
    "linear_attention_hidden_size hidden_size_per_layer_input ple_embed_dim router_hidden_size hidden_size_global "
    "adapter_in_dim adapter_out_dim adapter_input_size projection_size projection_dim",
    64: "intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dff intermediate_size_mlp "
    "mlp_hidden_size hidden_dim max_position_embeddings n_positions n_ctx mamba_d_ssm max_seq_len model_max_length",
    24: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size shared_experts_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim mamba_n_heads mamba_num_heads rotary_dim "
    "linear_num_value_heads time_step_rank mamba_dt_rank index_topk patch_size laurel_rank",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk top_k linear_num_key_heads index_n_heads "
    "num_experts_per_token n_mamba_heads linear_num_heads altup_num_inputs",
    8: "head_dim kv_channels d_kv attention_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state "
    "ssm_state_size linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim image_size",
    16: "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim mamba_headdim gated_norm_rank hc_lowrank",
    101: "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab",
    1: "n_group topk_group num_expert_group",
}  # fmt: skip
SMALL = {name: size for size, names in _NAMES.items() for name in names.split()}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")

_SWIN = {
    "image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
    "out_features": None, "out_indices": None,
}  # fmt: skip
# What the rule below does not get right, or the defaults leave open.
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_v4": {
        "qk_rope_head_dim": 4,
        "partial_rotary_factor": 0.5,
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "rope_parameters": None,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots3_note_text": {"head_dim": 12},
    "beit": {"out_features": None, "out_indices": None},
    "dinov2": {"out_features": None, "out_indices": None},
    "convnext": {"image_size": 64, "hidden_sizes": [8, 8, 16, 16]},
    "convnextv2": {"image_size": 64, "hidden_sizes": [8, 8, 16, 16]},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "esm": {"vocab_size": 101, "mask_token_id": 4, "pad_token_id": 1},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [64] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "ernie4_5_moe": {"moe_k": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "xlnet": {"d_head": 8, "d_inner": 64},
    "xlstm": {
        "embedding_dim": 32,
        "num_blocks": 2,
        "num_heads": 4,
        "chunk_size": 4,
        "ffn_round_up_to_multiple_of": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "d_model": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "layer_types": ["linear_attention", "indexed_attention"],
        "hidden_act": "silu",
    },
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 32,
        "n_mamba_heads": 2,
        "kv_channels": 8,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
}


# Encoders, encoder-decoders and models of images and speech that people pre-train.
OTHERS = (
    ("albert", "MaskedLM"), ("bart", "Seq2SeqLM"), ("beit", "ImageClassification"), ("bert", "PreTraining"),
    ("clip", ""), ("convnext", "ImageClassification"), ("convnextv2", "ImageClassification"),
    ("cvt", "ImageClassification"), ("deberta", "MaskedLM"), ("deberta-v2", "MaskedLM"),
    ("dinov2", "ImageClassification"),
    ("distilbert", "MaskedLM"), ("electra", "PreTraining"), ("esm", "MaskedLM"),
    ("eurobert", "MaskedLM"), ("fnet", "MaskedLM"), ("funnel", "MaskedLM"), ("hubert", ""), ("longformer", "MaskedLM"),
    ("longt5", "Seq2SeqLM"), ("modernbert", "MaskedLM"), ("mpnet", "MaskedLM"),
    ("mt5", "Seq2SeqLM"), ("nomic_bert", "MaskedLM"), ("roberta", "MaskedLM"), ("siglip", ""),
    ("swin", "ImageClassification"), ("swinv2", "ImageClassification"), ("t5", "Seq2SeqLM"), ("umt5", "Seq2SeqLM"),
    ("vit", "ImageClassification"), ("vit_mae", "PreTraining"), ("wav2vec2", "PreTraining"),
    ("whisper", "SpeechSeq2Seq"), ("xlm-roberta", "MaskedLM"),
)  # fmt: skip


def build_other(model_type: str, task: str) -> nn.Module:
    """A tiny model of `OTHERS`, by its auto class; without a task, the body alone."""
    auto = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
    model: nn.Module = auto.from_config(tiny_config(model_type), attn_implementation="eager")
    return model.eval()


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """Something that a forward pass of any of these models takes."""
    config: Any = model.config
    tokens = torch.randint(3, 90, (2, 12))
    taken = inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", config)
    side, found = getattr(vision, "image_size", 32), {}
    for name in taken:
        if name in ("input_ids", "decoder_input_ids"):
            found[name] = tokens
        elif name == "pixel_values":
            found[name] = torch.randn(2, 3, side, side)
        elif name == "input_values":
            found[name] = torch.randn(2, 2000)
        elif name == "input_features":
            found[name] = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
    return found


def build(model_type: str) -> nn.Module:
    """The tiny causal model, with attention computed by plain matrix products."""
    config = tiny_config(model_type)
    if model_type.startswith("musicgen"):  # the causal model is its decoder
        config = config.decoder
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(tiny_config(model_type))]
        return kind._from_config(config, attn_implementation="eager").eval()
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


def tiny_config(model_type: str) -> PretrainedConfig:
    """The type's default configuration with small widths, and one layer of each kind that it has."""
    default = AutoConfig.for_model(model_type)
    values = _small(default.to_dict())
    for name in ("architectures", "transformers_version", "dtype", "model_type"):
        values.pop(name, None)
    return type(default)(**values)


def _small(values: dict[str, Any]) -> dict[str, Any]:
    depth = next((values[name] for name in LAYERS if isinstance(values.get(name), int)), None)
    by_layer = {
        name: list(dict.fromkeys(map(str, v)))
        for name, v in values.items()
        if isinstance(v, list) and depth and len(v) == depth
    }
    kept = max((len(kinds) for kinds in by_layer.values()), default=1)
    kept = min(max(kept, 2), depth or 2)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and ("config" in name or "encoder" in name or "decoder" in name):
            small[name] = {} if name == "per_layer_config" else _small(value)
        elif name in by_layer:
            small[name] = _one_of_each(value, kept)
        elif name in LAYERS and isinstance(value, int):
            small[name] = kept
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(SMALL[name], value)
        elif name.endswith("_token_id") and isinstance(value, int):
            small[name] = min(value, 3)
        else:
            small[name] = value
    if "kv_lora_rank" in small:  # multi-head latent attention: as many keys as queries, in two pieces each
        small |= {"head_dim": 4, "qk_head_dim": 12, "num_key_value_heads": small["num_attention_heads"]}
    return small | SPECIAL.get(values.get("model_type", ""), {})


def _one_of_each(values: list[Any], kept: int) -> list[Any]:
    """The first of each kind, then again from the front, as many as there are layers."""
    kinds = list({str(value): value for value in values}.values())
    return [kinds[i % len(kinds)] for i in range(kept)]
