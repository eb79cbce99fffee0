"""The block of every parameter of the hard architectures, written out: what the proof by function cannot see too."""

from __future__ import annotations

# (model type, task of build_other; None: causal): {block: names}. N stands for any number, weight:q for a part of a
# fused weight.
BY_HAND: dict[tuple[str, str | None], dict[str, str]] = {
    ("minimax", None): {
        "emb": "model.embed_tokens.weight",
        "qk": "model.layers.N.self_attn.q_proj.weight model.layers.N.self_attn.k_proj.weight "
        "model.layers.N.self_attn.qkv_proj.weight:q model.layers.N.self_attn.qkv_proj.weight:k",
        "vo": "model.layers.N.self_attn.v_proj.weight model.layers.N.self_attn.o_proj.weight "
        "model.layers.N.self_attn.qkv_proj.weight:v model.layers.N.self_attn.out_proj.weight "
        "model.layers.N.self_attn.output_gate.weight",
        "norm": "model.layers.N.input_layernorm.weight model.layers.N.post_attention_layernorm.weight "
        "model.layers.N.self_attn.norm.weight model.norm.weight",
        "router": "model.layers.N.mlp.gate.weight",
        "ffn": "model.layers.N.mlp.experts.gate_up_proj model.layers.N.mlp.experts.down_proj",
        "head": "lm_head.weight",
    },
    ("reformer", None): {
        "emb": "reformer.embeddings.word_embeddings.weight",
        "pos": "reformer.embeddings.position_embeddings.weights.0 reformer.embeddings.position_embeddings.weights.1",
        "norm": "reformer.encoder.layers.N.attention.layer_norm.weight "
        "reformer.encoder.layers.N.attention.layer_norm.bias "
        "reformer.encoder.layers.N.feed_forward.layer_norm.weight "
        "reformer.encoder.layers.N.feed_forward.layer_norm.bias reformer.encoder.layer_norm.weight "
        "reformer.encoder.layer_norm.bias",
        "qk": "reformer.encoder.layers.N.attention.self_attention.query.weight "
        "reformer.encoder.layers.N.attention.self_attention.key.weight "
        "reformer.encoder.layers.N.attention.self_attention.query_key.weight",
        "vo": "reformer.encoder.layers.N.attention.self_attention.value.weight "
        "reformer.encoder.layers.N.attention.output.dense.weight",
        "ffn": "reformer.encoder.layers.N.feed_forward.dense.dense.weight "
        "reformer.encoder.layers.N.feed_forward.dense.dense.bias "
        "reformer.encoder.layers.N.feed_forward.output.dense.weight "
        "reformer.encoder.layers.N.feed_forward.output.dense.bias",
        "head": "lm_head.bias lm_head.decoder.weight",
    },
    ("xlstm", None): {
        "emb": "backbone.embeddings.weight",
        "norm": "backbone.blocks.N.norm_mlstm.weight backbone.blocks.N.mlstm_layer.multihead_norm.weight "
        "backbone.blocks.N.norm_ffn.weight backbone.out_norm.weight",
        "qk": "backbone.blocks.N.mlstm_layer.q.weight backbone.blocks.N.mlstm_layer.k.weight",
        "vo": "backbone.blocks.N.mlstm_layer.v.weight backbone.blocks.N.mlstm_layer.ogate_preact.weight "
        "backbone.blocks.N.mlstm_layer.out_proj.weight",
        "ssm": "backbone.blocks.N.mlstm_layer.igate_preact.weight backbone.blocks.N.mlstm_layer.igate_preact.bias "
        "backbone.blocks.N.mlstm_layer.fgate_preact.weight backbone.blocks.N.mlstm_layer.fgate_preact.bias",
        "ffn": "backbone.blocks.N.ffn.proj_up_gate.weight backbone.blocks.N.ffn.proj_up.weight "
        "backbone.blocks.N.ffn.proj_down.weight",
        "head": "lm_head.weight",
    },
    ("longformer", "MaskedLM"): {
        "emb": "longformer.embeddings.word_embeddings.weight longformer.embeddings.token_type_embeddings.weight "
        "lm_head.bias",
        "norm": "longformer.embeddings.LayerNorm.weight longformer.embeddings.LayerNorm.bias "
        "longformer.encoder.layer.N.attention.output.LayerNorm.weight "
        "longformer.encoder.layer.N.attention.output.LayerNorm.bias "
        "longformer.encoder.layer.N.output.LayerNorm.weight longformer.encoder.layer.N.output.LayerNorm.bias "
        "lm_head.layer_norm.weight lm_head.layer_norm.bias",
        "pos": "longformer.embeddings.position_embeddings.weight",
        "qk": "longformer.encoder.layer.N.attention.self.query.weight "
        "longformer.encoder.layer.N.attention.self.query.bias "
        "longformer.encoder.layer.N.attention.self.key.weight "
        "longformer.encoder.layer.N.attention.self.key.bias "
        "longformer.encoder.layer.N.attention.self.query_global.weight "
        "longformer.encoder.layer.N.attention.self.query_global.bias "
        "longformer.encoder.layer.N.attention.self.key_global.weight "
        "longformer.encoder.layer.N.attention.self.key_global.bias",
        "vo": "longformer.encoder.layer.N.attention.self.value.weight "
        "longformer.encoder.layer.N.attention.self.value.bias "
        "longformer.encoder.layer.N.attention.self.value_global.weight "
        "longformer.encoder.layer.N.attention.self.value_global.bias "
        "longformer.encoder.layer.N.attention.output.dense.weight "
        "longformer.encoder.layer.N.attention.output.dense.bias",
        "ffn": "longformer.encoder.layer.N.intermediate.dense.weight "
        "longformer.encoder.layer.N.intermediate.dense.bias longformer.encoder.layer.N.output.dense.weight "
        "longformer.encoder.layer.N.output.dense.bias",
        "head": "lm_head.dense.weight lm_head.dense.bias",
    },
    ("deepseek_v3", None): {
        "emb": "model.embed_tokens.weight",
        "qk": "model.layers.N.self_attn.q_a_proj.weight model.layers.N.self_attn.q_b_proj.weight "
        "model.layers.N.self_attn.kv_a_proj_with_mqa.weight:k model.layers.N.self_attn.kv_b_proj.weight:k",
        "norm": "model.layers.N.self_attn.q_a_layernorm.weight model.layers.N.self_attn.kv_a_layernorm.weight "
        "model.layers.N.input_layernorm.weight model.layers.N.post_attention_layernorm.weight "
        "model.norm.weight",
        "vo": "model.layers.N.self_attn.kv_a_proj_with_mqa.weight:latent "
        "model.layers.N.self_attn.kv_b_proj.weight:v model.layers.N.self_attn.o_proj.weight",
        "ffn": "model.layers.N.mlp.gate_proj.weight model.layers.N.mlp.up_proj.weight "
        "model.layers.N.mlp.down_proj.weight",
        "head": "lm_head.weight",
    },
    ("qwen3_next", None): {
        "emb": "model.embed_tokens.weight",
        "ssm": "model.layers.N.linear_attn.dt_bias model.layers.N.linear_attn.A_log "
        "model.layers.N.linear_attn.in_proj_ba.weight",
        "conv": "model.layers.N.linear_attn.conv1d.weight",
        "qk": "model.layers.N.linear_attn.in_proj_qkvz.weight:q model.layers.N.linear_attn.in_proj_qkvz.weight:k "
        "model.layers.N.self_attn.q_proj.weight:q model.layers.N.self_attn.k_proj.weight",
        "vo": "model.layers.N.linear_attn.in_proj_qkvz.weight:v model.layers.N.linear_attn.in_proj_qkvz.weight:gate "
        "model.layers.N.linear_attn.out_proj.weight model.layers.N.self_attn.q_proj.weight:gate "
        "model.layers.N.self_attn.v_proj.weight model.layers.N.self_attn.o_proj.weight",
        "norm": "model.layers.N.linear_attn.norm.weight model.layers.N.input_layernorm.weight "
        "model.layers.N.post_attention_layernorm.weight model.layers.N.self_attn.q_norm.weight "
        "model.layers.N.self_attn.k_norm.weight model.norm.weight",
        "router": "model.layers.N.mlp.gate.weight model.layers.N.mlp.shared_expert_gate.weight",
        "ffn": "model.layers.N.mlp.experts.gate_up_proj model.layers.N.mlp.experts.down_proj "
        "model.layers.N.mlp.shared_expert.gate_proj.weight model.layers.N.mlp.shared_expert.up_proj.weight "
        "model.layers.N.mlp.shared_expert.down_proj.weight",
        "head": "lm_head.weight",
    },
    ("mamba2", None): {
        "emb": "backbone.embeddings.weight",
        "norm": "backbone.layers.N.norm.weight backbone.layers.N.mixer.norm.weight backbone.norm_f.weight",
        "ssm": "backbone.layers.N.mixer.dt_bias backbone.layers.N.mixer.A_log backbone.layers.N.mixer.D "
        "backbone.layers.N.mixer.in_proj.weight backbone.layers.N.mixer.out_proj.weight",
        "conv": "backbone.layers.N.mixer.conv1d.weight backbone.layers.N.mixer.conv1d.bias",
        "head": "lm_head.weight",
    },
    ("jamba", None): {
        "emb": "model.embed_tokens.weight",
        "ssm": "model.layers.N.mamba.A_log model.layers.N.mamba.D model.layers.N.mamba.in_proj.weight "
        "model.layers.N.mamba.x_proj.weight model.layers.N.mamba.dt_proj.weight "
        "model.layers.N.mamba.dt_proj.bias model.layers.N.mamba.out_proj.weight",
        "conv": "model.layers.N.mamba.conv1d.weight model.layers.N.mamba.conv1d.bias",
        "norm": "model.layers.N.mamba.dt_layernorm.weight model.layers.N.mamba.b_layernorm.weight "
        "model.layers.N.mamba.c_layernorm.weight model.layers.N.input_layernorm.weight "
        "model.layers.N.pre_ff_layernorm.weight model.final_layernorm.weight",
        "ffn": "model.layers.N.feed_forward.gate_proj.weight model.layers.N.feed_forward.up_proj.weight "
        "model.layers.N.feed_forward.down_proj.weight model.layers.N.feed_forward.experts.gate_up_proj "
        "model.layers.N.feed_forward.experts.down_proj",
        "qk": "model.layers.N.self_attn.q_proj.weight model.layers.N.self_attn.k_proj.weight",
        "vo": "model.layers.N.self_attn.v_proj.weight model.layers.N.self_attn.o_proj.weight",
        "router": "model.layers.N.feed_forward.router.weight",
        "head": "lm_head.weight",
    },
    ("rwkv", None): {
        "emb": "rwkv.embeddings.weight",
        "norm": "rwkv.blocks.N.pre_ln.weight rwkv.blocks.N.pre_ln.bias rwkv.blocks.N.ln1.weight "
        "rwkv.blocks.N.ln1.bias rwkv.blocks.N.ln2.weight rwkv.blocks.N.ln2.bias rwkv.ln_out.weight "
        "rwkv.ln_out.bias",
        "ssm": "rwkv.blocks.N.attention.time_decay rwkv.blocks.N.attention.time_first "
        "rwkv.blocks.N.attention.time_mix_key rwkv.blocks.N.attention.time_mix_value "
        "rwkv.blocks.N.attention.time_mix_receptance rwkv.blocks.N.attention.key.weight "
        "rwkv.blocks.N.attention.value.weight rwkv.blocks.N.attention.receptance.weight "
        "rwkv.blocks.N.attention.output.weight",
        "other": "rwkv.blocks.N.feed_forward.time_mix_key rwkv.blocks.N.feed_forward.time_mix_receptance",
        "ffn": "rwkv.blocks.N.feed_forward.key.weight rwkv.blocks.N.feed_forward.receptance.weight "
        "rwkv.blocks.N.feed_forward.value.weight",
        "head": "head.weight",
    },
    ("recurrent_gemma", None): {
        "emb": "model.embed_tokens.weight",
        "norm": "model.layers.N.temporal_pre_norm.weight model.layers.N.channel_pre_norm.weight "
        "model.final_norm.weight",
        "ssm": "model.layers.N.temporal_block.linear_y.weight model.layers.N.temporal_block.linear_y.bias "
        "model.layers.N.temporal_block.linear_x.weight model.layers.N.temporal_block.linear_x.bias "
        "model.layers.N.temporal_block.linear_out.weight model.layers.N.temporal_block.linear_out.bias "
        "model.layers.N.temporal_block.rg_lru.recurrent_param "
        "model.layers.N.temporal_block.rg_lru.input_gate_weight "
        "model.layers.N.temporal_block.rg_lru.input_gate_bias "
        "model.layers.N.temporal_block.rg_lru.recurrent_gate_weight "
        "model.layers.N.temporal_block.rg_lru.recurrent_gate_bias",
        "conv": "model.layers.N.temporal_block.conv_1d.weight model.layers.N.temporal_block.conv_1d.bias",
        "ffn": "model.layers.N.mlp_block.gate_proj.weight model.layers.N.mlp_block.gate_proj.bias "
        "model.layers.N.mlp_block.up_proj.weight model.layers.N.mlp_block.up_proj.bias "
        "model.layers.N.mlp_block.down_proj.weight model.layers.N.mlp_block.down_proj.bias",
        "qk": "model.layers.N.temporal_block.q_proj.weight model.layers.N.temporal_block.k_proj.weight",
        "vo": "model.layers.N.temporal_block.v_proj.weight model.layers.N.temporal_block.o_proj.weight "
        "model.layers.N.temporal_block.o_proj.bias",
    },
    ("bert", "PreTraining"): {
        "emb": "bert.embeddings.word_embeddings.weight bert.embeddings.token_type_embeddings.weight "
        "cls.predictions.bias",
        "pos": "bert.embeddings.position_embeddings.weight",
        "norm": "bert.embeddings.LayerNorm.weight bert.embeddings.LayerNorm.bias "
        "bert.encoder.layer.N.attention.output.LayerNorm.weight "
        "bert.encoder.layer.N.attention.output.LayerNorm.bias bert.encoder.layer.N.output.LayerNorm.weight "
        "bert.encoder.layer.N.output.LayerNorm.bias cls.predictions.transform.LayerNorm.weight "
        "cls.predictions.transform.LayerNorm.bias",
        "qk": "bert.encoder.layer.N.attention.self.query.weight bert.encoder.layer.N.attention.self.query.bias "
        "bert.encoder.layer.N.attention.self.key.weight bert.encoder.layer.N.attention.self.key.bias",
        "vo": "bert.encoder.layer.N.attention.self.value.weight bert.encoder.layer.N.attention.self.value.bias "
        "bert.encoder.layer.N.attention.output.dense.weight bert.encoder.layer.N.attention.output.dense.bias",
        "ffn": "bert.encoder.layer.N.intermediate.dense.weight bert.encoder.layer.N.intermediate.dense.bias "
        "bert.encoder.layer.N.output.dense.weight bert.encoder.layer.N.output.dense.bias",
        "other": "bert.pooler.dense.weight bert.pooler.dense.bias",
        "head": "cls.predictions.transform.dense.weight cls.predictions.transform.dense.bias "
        "cls.seq_relationship.weight cls.seq_relationship.bias",
    },
    ("t5", "Seq2SeqLM"): {
        "emb": "shared.weight",
        "qk": "encoder.block.N.layer.N.SelfAttention.q.weight encoder.block.N.layer.N.SelfAttention.k.weight "
        "decoder.block.N.layer.N.SelfAttention.q.weight decoder.block.N.layer.N.SelfAttention.k.weight "
        "decoder.block.N.layer.N.EncDecAttention.q.weight decoder.block.N.layer.N.EncDecAttention.k.weight",
        "vo": "encoder.block.N.layer.N.SelfAttention.v.weight encoder.block.N.layer.N.SelfAttention.o.weight "
        "decoder.block.N.layer.N.SelfAttention.v.weight decoder.block.N.layer.N.SelfAttention.o.weight "
        "decoder.block.N.layer.N.EncDecAttention.v.weight decoder.block.N.layer.N.EncDecAttention.o.weight",
        "pos": "encoder.block.N.layer.N.SelfAttention.relative_attention_bias.weight "
        "decoder.block.N.layer.N.SelfAttention.relative_attention_bias.weight",
        "norm": "encoder.block.N.layer.N.layer_norm.weight encoder.final_layer_norm.weight "
        "decoder.block.N.layer.N.layer_norm.weight decoder.final_layer_norm.weight",
        "ffn": "encoder.block.N.layer.N.DenseReluDense.wi.weight encoder.block.N.layer.N.DenseReluDense.wo.weight "
        "decoder.block.N.layer.N.DenseReluDense.wi.weight decoder.block.N.layer.N.DenseReluDense.wo.weight",
    },
    ("vit", "ImageClassification"): {
        "emb": "vit.embeddings.cls_token",
        "pos": "vit.embeddings.position_embeddings",
        "conv": "vit.embeddings.patch_embeddings.projection.weight vit.embeddings.patch_embeddings.projection.bias",
        "qk": "vit.layers.N.attention.q_proj.weight vit.layers.N.attention.q_proj.bias "
        "vit.layers.N.attention.k_proj.weight vit.layers.N.attention.k_proj.bias",
        "vo": "vit.layers.N.attention.v_proj.weight vit.layers.N.attention.v_proj.bias "
        "vit.layers.N.attention.o_proj.weight vit.layers.N.attention.o_proj.bias",
        "norm": "vit.layers.N.layernorm_before.weight vit.layers.N.layernorm_before.bias "
        "vit.layers.N.layernorm_after.weight vit.layers.N.layernorm_after.bias vit.layernorm.weight "
        "vit.layernorm.bias",
        "ffn": "vit.layers.N.mlp.fc1.weight vit.layers.N.mlp.fc1.bias vit.layers.N.mlp.fc2.weight "
        "vit.layers.N.mlp.fc2.bias",
        "head": "classifier.weight classifier.bias",
    },
    ("gpt_oss", None): {
        "emb": "model.embed_tokens.weight",
        "other": "model.layers.N.self_attn.sinks",
        "qk": "model.layers.N.self_attn.q_proj.weight model.layers.N.self_attn.q_proj.bias "
        "model.layers.N.self_attn.k_proj.weight model.layers.N.self_attn.k_proj.bias",
        "vo": "model.layers.N.self_attn.v_proj.weight model.layers.N.self_attn.v_proj.bias "
        "model.layers.N.self_attn.o_proj.weight model.layers.N.self_attn.o_proj.bias",
        "router": "model.layers.N.mlp.router.weight model.layers.N.mlp.router.bias",
        "ffn": "model.layers.N.mlp.experts.gate_up_proj model.layers.N.mlp.experts.gate_up_proj_bias "
        "model.layers.N.mlp.experts.down_proj model.layers.N.mlp.experts.down_proj_bias",
        "norm": "model.layers.N.input_layernorm.weight model.layers.N.post_attention_layernorm.weight "
        "model.norm.weight",
        "head": "lm_head.weight",
    },
    ("deberta", "MaskedLM"): {
        "emb": "deberta.embeddings.word_embeddings.weight cls.predictions.bias",
        "pos": "deberta.embeddings.position_embeddings.weight",
        "norm": "deberta.embeddings.LayerNorm.weight deberta.embeddings.LayerNorm.bias "
        "deberta.encoder.layer.N.attention.output.LayerNorm.weight "
        "deberta.encoder.layer.N.attention.output.LayerNorm.bias "
        "deberta.encoder.layer.N.output.LayerNorm.weight deberta.encoder.layer.N.output.LayerNorm.bias "
        "cls.predictions.transform.LayerNorm.weight cls.predictions.transform.LayerNorm.bias",
        "qk": "deberta.encoder.layer.N.attention.self.q_bias "
        "deberta.encoder.layer.N.attention.self.in_proj.weight:q "
        "deberta.encoder.layer.N.attention.self.in_proj.weight:k",
        "vo": "deberta.encoder.layer.N.attention.self.v_bias "
        "deberta.encoder.layer.N.attention.self.in_proj.weight:v "
        "deberta.encoder.layer.N.attention.output.dense.weight "
        "deberta.encoder.layer.N.attention.output.dense.bias",
        "ffn": "deberta.encoder.layer.N.intermediate.dense.weight deberta.encoder.layer.N.intermediate.dense.bias "
        "deberta.encoder.layer.N.output.dense.weight deberta.encoder.layer.N.output.dense.bias",
        "head": "cls.predictions.transform.dense.weight cls.predictions.transform.dense.bias",
    },
    ("codegen", None): {
        "emb": "transformer.wte.weight",
        "norm": "transformer.h.N.ln_1.weight transformer.h.N.ln_1.bias transformer.ln_f.weight transformer.ln_f.bias",
        "qk": "transformer.h.N.attn.qkv_proj.weight:q transformer.h.N.attn.qkv_proj.weight:k",
        "vo": "transformer.h.N.attn.qkv_proj.weight:v transformer.h.N.attn.out_proj.weight",
        "ffn": "transformer.h.N.mlp.fc_in.weight transformer.h.N.mlp.fc_in.bias transformer.h.N.mlp.fc_out.weight "
        "transformer.h.N.mlp.fc_out.bias",
        "head": "lm_head.weight lm_head.bias",
    },
    ("swin", "ImageClassification"): {
        "conv": "swin.embeddings.patch_embeddings.projection.weight swin.embeddings.patch_embeddings.projection.bias",
        "norm": "swin.embeddings.norm.weight swin.embeddings.norm.bias "
        "swin.encoder.layers.N.blocks.N.layernorm_before.weight "
        "swin.encoder.layers.N.blocks.N.layernorm_before.bias "
        "swin.encoder.layers.N.blocks.N.layernorm_after.weight "
        "swin.encoder.layers.N.blocks.N.layernorm_after.bias swin.encoder.layers.N.downsample.norm.weight "
        "swin.encoder.layers.N.downsample.norm.bias swin.layernorm.weight swin.layernorm.bias",
        "qk": "swin.encoder.layers.N.blocks.N.attention.q_proj.weight "
        "swin.encoder.layers.N.blocks.N.attention.q_proj.bias "
        "swin.encoder.layers.N.blocks.N.attention.k_proj.weight "
        "swin.encoder.layers.N.blocks.N.attention.k_proj.bias",
        "vo": "swin.encoder.layers.N.blocks.N.attention.v_proj.weight "
        "swin.encoder.layers.N.blocks.N.attention.v_proj.bias "
        "swin.encoder.layers.N.blocks.N.attention.o_proj.weight "
        "swin.encoder.layers.N.blocks.N.attention.o_proj.bias",
        "pos": "swin.encoder.layers.N.blocks.N.attention.relative_position_bias.relative_position_bias_table",
        "ffn": "swin.encoder.layers.N.blocks.N.mlp.fc1.weight swin.encoder.layers.N.blocks.N.mlp.fc1.bias "
        "swin.encoder.layers.N.blocks.N.mlp.fc2.weight swin.encoder.layers.N.blocks.N.mlp.fc2.bias",
        "other": "swin.encoder.layers.N.downsample.reduction.weight",
        "head": "classifier.weight classifier.bias",
    },
}
