"""Patterns for the parameter names of the trainers' own model code, checked against names written out by hand."""

from __future__ import annotations

import pytest

from blockwise_lr.export import export_rates
from support.export_models import RATIOS, tiny
from support.matching_rules import RULES

LR = 1e-3
FUSED = 0.5  # the lower of QK's and VO's

NAMES = {
    ("torchtitan", "llama"): {
        "tok_embeddings.weight": "emb",
        "layers.1.attention.qkv_linear.wq.weight": "qk",
        "layers.1.attention.qkv_linear.wk.weight": "qk",
        "layers.1.attention.qkv_linear.wv.weight": "vo",
        "layers.1.attention.wo.weight": "vo",
        "layers.1.attention_norm.weight": "norm",
        "layers.1.feed_forward.w1.weight": "ffn",
        "layers.1.feed_forward.w2.weight": "ffn",
        "layers.1.feed_forward.w3.weight": "ffn",
        "layers.1.ffn_norm.weight": "norm",
        "norm.weight": "norm",
        "lm_head.weight": "head",
    },
    ("olmo-core", "llama"): {
        "embeddings.weight": "emb",
        "blocks.1.attention.w_q.weight": "qk",
        "blocks.1.attention.w_k.weight": "qk",
        "blocks.1.attention.w_v.weight": "vo",
        "blocks.1.attention.w_out.weight": "vo",
        "blocks.1.attention_norm.weight": "norm",
        "blocks.1.feed_forward.w1.weight": "ffn",
        "blocks.1.feed_forward.w2.weight": "ffn",
        "blocks.1.feed_forward.w3.weight": "ffn",
        "blocks.1.feed_forward_norm.weight": "norm",
        "lm_head.norm.weight": "norm",
        "lm_head.w_out.weight": "head",
    },
    ("fairseq2", "llama"): {
        "decoder_frontend.embed.weight": "emb",
        "decoder.layers.1.self_attn.q_proj.weight": "qk",
        "decoder.layers.1.self_attn.k_proj.weight": "qk",
        "decoder.layers.1.self_attn.v_proj.weight": "vo",
        "decoder.layers.1.self_attn.output_proj.weight": "vo",
        "decoder.layers.1.self_attn_layer_norm.weight": "norm",
        "decoder.layers.1.ffn.gate_proj.weight": "ffn",
        "decoder.layers.1.ffn.inner_proj.weight": "ffn",
        "decoder.layers.1.ffn.output_proj.weight": "ffn",
        "decoder.layers.1.ffn_layer_norm.weight": "norm",
        "decoder.layer_norm.weight": "norm",
        "final_proj.weight": "head",
    },
    ("megatron", "llama"): {
        "embedding.word_embeddings.weight": "emb",
        "decoder.layers.1.input_layernorm.weight": "norm",
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight": "norm",
        "decoder.layers.1.self_attention.linear_qkv.weight": "qkv",
        "decoder.layers.1.self_attention.linear_proj.weight": "vo",
        "decoder.layers.1.pre_mlp_layernorm.weight": "norm",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": "norm",
        "decoder.layers.1.mlp.linear_fc1.weight": "ffn",
        "decoder.layers.1.mlp.linear_fc2.weight": "ffn",
        "decoder.final_layernorm.weight": "norm",
        "output_layer.weight": "head",
    },
    ("megatron", "gpt2"): {
        "embedding.word_embeddings.weight": "emb",
        "embedding.position_embeddings.weight": "pos",
        "decoder.layers.1.input_layernorm.bias": "norm",
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight": "norm",
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_bias": "norm",
        "decoder.layers.1.self_attention.linear_qkv.weight": "qkv",
        "decoder.layers.1.self_attention.linear_qkv.bias": "qkv",
        "decoder.layers.1.self_attention.linear_proj.bias": "vo",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_bias": "norm",
        "decoder.layers.1.mlp.linear_fc1.weight": "ffn",
        "decoder.layers.1.mlp.linear_fc1.bias": "ffn",
        "decoder.layers.1.mlp.linear_fc2.bias": "ffn",
        "decoder.final_layernorm.bias": "norm",
    },
    ("megatron", "mixtral"): {
        "embedding.word_embeddings.weight": "emb",
        "decoder.layers.1.self_attention.linear_qkv.weight": "qkv",
        "decoder.layers.1.self_attention.linear_proj.weight": "vo",
        "decoder.layers.1.pre_mlp_layernorm.weight": "norm",
        "decoder.layers.1.mlp.router.weight": "router",
        "decoder.layers.1.mlp.experts.linear_fc1.weight7": "ffn",
        "decoder.layers.1.mlp.experts.linear_fc2.weight7": "ffn",
        "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight": "ffn",
        "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight": "ffn",
        "decoder.layers.1.mlp.experts.weight1": "ffn",
        "decoder.layers.1.mlp.experts.weight2": "ffn",
        "output_layer.weight": "head",
    },
}


@pytest.mark.parametrize(("target", "name"), NAMES, ids=" ".join)
def test_the_trainers_own_parameters_get_the_rates_of_their_blocks(target, name):
    exported = export_rates(tiny(name), target, lr=LR, ratios=RATIOS)
    found = RULES[target](exported.text, NAMES[target, name])
    ratios = RATIOS | {"qkv": FUSED}
    assert {each: lr for each, (lr, _) in found.items()} == {
        each: pytest.approx(LR * ratios[block]) for each, block in NAMES[target, name].items()
    }
    assert "Transformer's own" not in exported.naming
    assert bool(exported.lost) == (target == "megatron")
    assert ("needs fuse_qkv=False" in exported.text) == (target == "torchtitan")


def test_a_ratio_for_weights_that_the_trainer_fuses():
    exported = export_rates(tiny("llama"), "megatron", lr=LR, ratios={**RATIOS, "qkv": 2.0})
    found = RULES["megatron"](exported.text, NAMES["megatron", "llama"])
    assert found["decoder.layers.1.self_attention.linear_qkv.weight"][0] == pytest.approx(2 * LR)
    assert exported.lost == ()


@pytest.mark.parametrize(
    ("target", "name"), [("torchtitan", "mixtral"), ("olmo-core", "gpt2"), ("timm", "llama")]
)
def test_a_model_that_the_trainer_lacks_keeps_its_names(target, name):
    model = tiny(name)
    exported = export_rates(model, target, lr=LR)
    assert exported.naming == f"{type(model).__name__}'s own"
    assert f"Parameter names: {exported.naming}." in exported.text


def test_names_of_the_model_on_request():
    model = tiny("llama")
    exported = export_rates(model, "torchtitan", lr=LR, names="model")
    assert RULES["torchtitan"](exported.text, dict(model.named_parameters()))
    with pytest.raises(ValueError, match='names is \'mine\'; expected "auto" or "model"'):
        export_rates(model, "torchtitan", lr=LR, names="mine")
