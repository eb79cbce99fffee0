"""Names of parameters in the model code of other trainers, translated from those of transformers.

The tables hold modules, with {} for a layer's number; a parameter's last component (weight, bias) is kept. Sources:

    torchtitan 0.3.0       torchtitan/models/{llama3,qwen3}/state_dict_adapter.py, from_hf_map
    OLMo-core 3.0.0        olmo_core/nn/hf/convert.py, HF_TO_OLMO_CORE_WEIGHT_MAPPINGS
    fairseq2 0.8.1         fairseq2/models/{llama,mistral,qwen}/interop.py, _HG_KEY_MAP
    megatron-core 0.16.1   megatron/core/models/gpt, transformer/{attention,mlp,transformer_layer}.py and moe/
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from blockwise_lr.export.rates import RateGroup, Rates, fused_decay_note, fused_note

_Table = Mapping[str, str | tuple[str, ...]]

_LAYER = "model.layers.{}."

_TORCHTITAN: _Table = {
    "model.embed_tokens": "tok_embeddings",
    _LAYER + "self_attn.q_proj": "layers.{}.attention.qkv_linear.wq",
    _LAYER + "self_attn.k_proj": "layers.{}.attention.qkv_linear.wk",
    _LAYER + "self_attn.v_proj": "layers.{}.attention.qkv_linear.wv",
    _LAYER + "self_attn.o_proj": "layers.{}.attention.wo",
    _LAYER + "self_attn.q_norm": "layers.{}.attention.q_norm",
    _LAYER + "self_attn.k_norm": "layers.{}.attention.k_norm",
    _LAYER + "mlp.gate_proj": "layers.{}.feed_forward.w1",
    _LAYER + "mlp.up_proj": "layers.{}.feed_forward.w3",
    _LAYER + "mlp.down_proj": "layers.{}.feed_forward.w2",
    _LAYER + "mlp.gate": "layers.{}.moe.router.gate",
    _LAYER + "mlp.experts.gate_up_proj": (
        "layers.{}.moe.routed_experts.inner_experts.w1_EFD",
        "layers.{}.moe.routed_experts.inner_experts.w3_EFD",
    ),
    _LAYER + "mlp.experts.down_proj": "layers.{}.moe.routed_experts.inner_experts.w2_EDF",
    _LAYER + "input_layernorm": "layers.{}.attention_norm",
    _LAYER + "post_attention_layernorm": "layers.{}.ffn_norm",
    "model.norm": "norm",
    "lm_head": "lm_head",
}

_OLMO_CORE: _Table = {
    "model.embed_tokens": "embeddings",
    _LAYER + "self_attn.q_proj": "blocks.{}.attention.w_q",
    _LAYER + "self_attn.k_proj": "blocks.{}.attention.w_k",
    _LAYER + "self_attn.v_proj": "blocks.{}.attention.w_v",
    _LAYER + "self_attn.o_proj": "blocks.{}.attention.w_out",
    _LAYER + "self_attn.q_norm": "blocks.{}.attention.q_norm",
    _LAYER + "self_attn.k_norm": "blocks.{}.attention.k_norm",
    _LAYER + "mlp.gate_proj": "blocks.{}.feed_forward.w1",
    _LAYER + "mlp.up_proj": "blocks.{}.feed_forward.w3",
    _LAYER + "mlp.down_proj": "blocks.{}.feed_forward.w2",
    _LAYER + "input_layernorm": "blocks.{}.attention_norm",
    _LAYER + "post_attention_layernorm": "blocks.{}.feed_forward_norm",
    "model.norm": "lm_head.norm",
    "lm_head": "lm_head.w_out",
}

_FAIRSEQ2: _Table = {
    "model.embed_tokens": "decoder_frontend.embed",
    _LAYER + "self_attn.q_proj": "decoder.layers.{}.self_attn.q_proj",
    _LAYER + "self_attn.k_proj": "decoder.layers.{}.self_attn.k_proj",
    _LAYER + "self_attn.v_proj": "decoder.layers.{}.self_attn.v_proj",
    _LAYER + "self_attn.o_proj": "decoder.layers.{}.self_attn.output_proj",
    _LAYER + "self_attn.q_norm": "decoder.layers.{}.self_attn.q_norm",
    _LAYER + "self_attn.k_norm": "decoder.layers.{}.self_attn.k_norm",
    _LAYER + "mlp.gate_proj": "decoder.layers.{}.ffn.gate_proj",
    _LAYER + "mlp.up_proj": "decoder.layers.{}.ffn.inner_proj",
    _LAYER + "mlp.down_proj": "decoder.layers.{}.ffn.output_proj",
    _LAYER + "input_layernorm": "decoder.layers.{}.self_attn_layer_norm",
    _LAYER + "post_attention_layernorm": "decoder.layers.{}.ffn_layer_norm",
    "model.norm": "decoder.layer_norm",
    "lm_head": "final_proj",
}

# Megatron's layers have one of two forms, and its experts one of three: the names of all are given. A "layer_norm_"
# at the end is joined to the last component, since Transformer Engine fuses a norm with the linear layer after it.
_DECODER = "decoder.layers.{}."
_NORM_BEFORE_QKV = (_DECODER + "input_layernorm", _DECODER + "self_attention.linear_qkv.layer_norm_")
_NORM_BEFORE_MLP = (_DECODER + "pre_mlp_layernorm", _DECODER + "mlp.linear_fc1.layer_norm_")
_MEGATRON: _Table = {
    "model.embed_tokens": "embedding.word_embeddings",
    **{_LAYER + f"self_attn.{part}_proj": _DECODER + "self_attention.linear_qkv" for part in "qkv"},
    _LAYER + "self_attn.o_proj": _DECODER + "self_attention.linear_proj",
    _LAYER + "self_attn.q_norm": _DECODER + "self_attention.q_layernorm",
    _LAYER + "self_attn.k_norm": _DECODER + "self_attention.k_layernorm",
    _LAYER + "mlp.gate_proj": _DECODER + "mlp.linear_fc1",
    _LAYER + "mlp.up_proj": _DECODER + "mlp.linear_fc1",
    _LAYER + "mlp.down_proj": _DECODER + "mlp.linear_fc2",
    _LAYER + "mlp.gate": _DECODER + "mlp.router",
    _LAYER + "mlp.experts.gate_up_proj": (
        _DECODER + "mlp.experts.linear_fc1.weight0",
        _DECODER + "mlp.experts.local_experts.0.linear_fc1.weight",
        _DECODER + "mlp.experts.weight1",
    ),
    _LAYER + "mlp.experts.down_proj": (
        _DECODER + "mlp.experts.linear_fc2.weight0",
        _DECODER + "mlp.experts.local_experts.0.linear_fc2.weight",
        _DECODER + "mlp.experts.weight2",
    ),
    _LAYER + "input_layernorm": _NORM_BEFORE_QKV,
    _LAYER + "post_attention_layernorm": _NORM_BEFORE_MLP,
    "model.norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
    # GPT-2.
    "transformer.wte": "embedding.word_embeddings",
    "transformer.wpe": "embedding.position_embeddings",
    "transformer.h.{}.ln_1": _NORM_BEFORE_QKV,
    "transformer.h.{}.attn.c_attn": _DECODER + "self_attention.linear_qkv",
    "transformer.h.{}.attn.c_proj": _DECODER + "self_attention.linear_proj",
    "transformer.h.{}.ln_2": _NORM_BEFORE_MLP,
    "transformer.h.{}.mlp.c_fc": _DECODER + "mlp.linear_fc1",
    "transformer.h.{}.mlp.c_proj": _DECODER + "mlp.linear_fc2",
    "transformer.ln_f": "decoder.final_layernorm",
}

_DENSE = ("llama", "mistral", "qwen2", "qwen3")
_TABLES: Mapping[str, tuple[_Table, tuple[str, ...], str]] = {
    "torchtitan": (_TORCHTITAN, ("llama", "qwen3", "qwen3_moe"), "torchtitan's models (0.3.0)"),
    "olmo-core": (_OLMO_CORE, ("llama", "qwen3"), "OLMo-core's Transformer (3.0.0)"),
    "fairseq2": (_FAIRSEQ2, _DENSE, "fairseq2's models (0.8.1)"),
    "megatron": (_MEGATRON, (*_DENSE, "gpt2", "mixtral", "qwen3_moe"), "Megatron-core's GPTModel (0.16.1)"),
}
"""For each target: its table, the model types of transformers that it holds for, and whose names it gives."""


def in_names_of(target: str, rates: Rates) -> Rates:
    """Return the rates under the parameter names of the target's own model code, where they are known.

    Known are the model types in :data:`_TABLES`. Otherwise the names stay, and `naming` says whose they are. Parameters
    that the target fuses get the lower of their ratios and the weight decay that goes with it, or the lower one where
    the ratios are equal; `lost` says so. Megatron's last pipeline stage has a copy of a tied embedding, which gets the
    embedding's rate.

    Args:
        target: the target's name.
        rates: the rates under the model's own names.
    """
    table, model_types, naming = _TABLES.get(target, ({}, (), ""))
    if getattr(getattr(rates.model, "config", None), "model_type", None) not in model_types:
        return rates
    sources: dict[str, dict[str, None]] = {}
    for name in rates.label_of:
        translated = _translated(name, table)
        if not translated:
            return rates  # such as a model whose fused weights are split
        for each in translated:
            sources.setdefault(each, {})[name] = None
    embedding = sources.get("embedding.word_embeddings.weight")
    if embedding and target == "megatron" and getattr(rates.model.config, "tie_word_embeddings", False):
        sources["output_layer.weight"] = embedding
    groups = {group.label: group for group in rates.groups}
    members: dict[str, list[str]] = {}
    fused: dict[tuple[str, ...], list[str]] = {}
    for name, own in sources.items():
        labels = tuple(
            sorted({rates.label_of[each] for each in own}, key=lambda label: _lowest(groups[label]))
        )
        members.setdefault("+".join(labels), []).append(name)
        if len(labels) > 1:
            fused.setdefault(labels, []).append(name)
    found, lost = [], list(rates.lost)
    for key, names in members.items():
        labels = tuple(key.split("+"))
        if len(labels) == 1:
            found.append(replace(groups[key], names=tuple(names)))
            continue
        number = list(fused).index(labels) + 1
        parts = [groups[label] for label in labels]
        group, notes = _fused("qkv" if number == 1 else f"qkv_{number}", parts, names, rates)
        found.append(group)
        lost += notes
    return replace(rates, groups=tuple(found), naming=naming, lost=tuple(lost))


def _lowest(group: RateGroup) -> tuple[float, float, str]:
    """Return what orders fused groups. Nothing else may decide: the order of a set differs between processes."""
    return group.lr_ratio, group.weight_decay, group.label


def _fused(
    label: str, parts: Sequence[RateGroup], names: Sequence[str], rates: Rates
) -> tuple[RateGroup, list[str]]:
    """Return the group of parameters that hold several groups' weights, the lowest ratio first, and what that loses."""
    ratio = parts[0].lr_ratio if rates.fused_ratio is None else rates.fused_ratio
    ratios = {part.block: part.lr_ratio for part in parts}
    lost = (
        []
        if rates.fused_ratio is not None or len(set(ratios.values())) == 1
        else [fused_note(names, ratios, ratio)]
    )
    # With constant decay, a group's weight decay is that of ratio 1 over its ratio.
    decays = {
        part.block: round(part.weight_decay * (part.lr_ratio if rates.constant_decay else 1.0), 12)
        for part in parts
    }
    decay = decays[parts[0].block] if rates.fused_decay is None else rates.fused_decay
    if rates.fused_decay is None and len(set(decays.values())) > 1:
        lost.append(fused_decay_note(names, decays, decay))
    return RateGroup(
        label, "qkv", ratio, decay / (ratio if rates.constant_decay else 1.0), tuple(names)
    ), lost


def _translated(name: str, table: _Table) -> list[str]:
    """Return the names that a parameter of transformers has in the other code."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    general = name.replace(f".{number[0]}.", ".{}.", 1) if number else name
    whole = table.get(general)
    module, _, leaf = general.rpartition(".")
    found = whole if whole is not None else table.get(module, ())
    ending = "" if whole is not None else f".{leaf}"
    layer = number[0] if number else ""
    names = (found,) if isinstance(found, str) else found
    return [
        each.format(layer) + (ending.removeprefix(".") if each.endswith("_") else ending) for each in names
    ]
