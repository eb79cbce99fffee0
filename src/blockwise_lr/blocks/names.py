"""What is known by its name alone, after everything that topology and types decide (`blocks/rules.py`).

One line a kind of parameter: its block, a pattern, and why. The pattern is searched in "path:Type.leaf", such as
"model.layers.0.self_attn:GptOssAttention.sinks": the module that owns the parameter, that module's class, and what it
calls the parameter. To add a kind, write one line here and one case in tests/cases.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from blockwise_lr.blocks.block import Block


class Named(NamedTuple):
    """One line of the table; `reason` may use the fields of a rule's."""

    block: Block
    pattern: re.Pattern[str]
    reason: str


def _line(block: Block, pattern: str, reason: str) -> Named:
    return Named(block, re.compile(pattern), reason)


NAMES: tuple[Named, ...] = (
    # Of attention, beside its matrices.
    _line(Block.ROUTER, r"indexer\.|:\w*Indexer", "{leaf} of {module}: chooses the keys that attention sees"),
    _line(
        Block.VO,
        r"compressor(\.(kv|gate)_proj)?:\w+\.weight",
        "{module} pools keys and values: the sharper block of the two",
    ),
    _line(Block.QK, r"attn\.r_proj:", "makes the queries of relative positions in {module}"),
    _line(Block.QK, r":XLNet\w*Attention\.(q|k|r|r_\w_bias)$", "makes queries or keys of {module}"),
    _line(Block.VO, r":XLNet\w*Attention\.[vo]$", "makes values or the output of {module}"),
    _line(
        Block.QK,
        r":\w*Attention\.(q_bias|r_kernel|r_\w_bias)$",
        "{leaf} of {module}: moves its queries or keys",
    ),
    _line(Block.VO, r":\w*Attention\.v_bias$", "{leaf} of {module}: the bias of its values"),
    _line(
        Block.QK, r"attention\.experts\.input_linear:", "makes the queries of the attention experts {module}"
    ),
    _line(
        Block.VO, r"attention\.experts\.output_linear:", "makes the output of the attention experts {module}"
    ),
    _line(Block.VO, r":\w*(MoA\.bias|Attention\.dense_bias)$", "the bias of the output of {module}"),
    _line(Block.OTHER, r"\.sinks?$|\bsink_proj:", "{leaf} of {module}: sinks of the attention"),
    _line(Block.OTHER, r"attn:\w+\.lambda_", "{leaf} of {module}: weighs two attentions that are subtracted"),
    _line(
        Block.OTHER, r":DogeAttention\.A$|attn\.dt_proj:", "{leaf} of {module}: makes the attention's mask"
    ),
    _line(
        Block.POS,
        r"\.rel(ative)?_(pos|attention_bias)|(RelativeAttentionBias|RelativeLogits)\.|\brelative_pos\w*:"
        r"|\.position_bias$|position_embeddings\.weights:|(position_bias|cpb)_mlp\.|Attention\.seg_embed$",
        "{leaf} of {module}: relative positions",
    ),
    # Mixture of experts.
    _line(
        Block.ROUTER,
        r"shared_expert_gate|\brouter|TopKGating|\bmlp\.gate\.\w+:",
        "{module} chooses experts, or how much of one",
    ),
    _line(
        Block.FFN,
        r":\w*((MoE|Experts)\.\w*bias|ExpertGLU\.\w+)$",
        "{leaf} of {module}: of the feed-forward experts",
    ),
    # Sequence mixers that are no attention.
    _line(
        Block.CONV,
        r":\w*ShortConv|sconv\.weight_proj:|\.glu:\w+\.b\d$",
        "{leaf} of {module}: a convolution's",
    ),
    _line(Block.SSM, r"\.[if]gate\w*:", "{module} makes a gate of the memory of an xLSTM"),
    _line(
        Block.OTHER, r":Rwkv\w*\.time_mix_", "{leaf} of {module}: how much of the token before is mixed in"
    ),
    # Feed-forward.
    _line(
        Block.FFN, r"feed_forward\.(key|value|receptance):", "{module} is a matrix of RWKV's channel mixing"
    ),
    _line(
        Block.FFN, r"attn_pool\.mlp\.fc\d:", "{module} is a feed-forward matrix behind the pooling attention"
    ),
    _line(
        Block.FFN,
        r"\b(shared_)?mlps?\.(\d+\.)?((in|out)put_linear|\w+\.linear):",
        "a matrix named as a feed-forward layer's",
    ),
    _line(
        Block.FFN,
        r"\.pwconv\d:",
        "{module} is a pointwise convolution that widens or narrows, as in a feed-forward",
    ),
    _line(
        Block.FFN,
        r"(?<!attention)\.(intermediate|output)\.dense:",
        "a matrix named as a feed-forward layer's",
    ),
    _line(Block.NORM, r"GRN\.(weight|bias)$", "{leaf} of {module}, a {type}: global response normalization"),
    # Embeddings, and what leads from them to the model's width.
    _line(
        Block.EMB,
        r"\.(cls|mask|masked_spec|dist|class|distillation|register|reg)_(token|emb|embed|embedding)s?$",
        "{leaf} of {module}: the embedding of one token",
    ),
    _line(Block.EMB, r":\w*Embedding\.weight$", "{module} is an embedding: rows that are looked up by index"),
    _line(
        Block.OTHER,
        r"projector|multi_?modal|img_projection|vision_embed|visual_projection|embed\w*_proj(ect(ion)?)?\b"
        r"|\bproject_(in|out):|hidden_mapping|map_inputs|model_projection|proj_for|feature_extensor|feature_projection|patch_embedding:|embedding_transformation|embeddings\.projection:|decoder_embed:|encoder\.embed\.out:",
        "{module} leads from an embedding, or another modality, to the model's width",
    ),
    # Heads.
    _line(
        Block.HEAD,
        r"(^|\.)(\w*predictions?|lm_head|head|prediction_head)\.(\w+\.)*dense\w*:|vocab_transform:|decoder_pred:|embedding_decoder:",
        "{module}: in a head",
    ),
    _line(Block.HEAD, r"\b(lm_)?heads\.\d+:|(^|\.)head(\.fc|_dist):", "{module} is an output head"),
    _line(Block.OTHER, r"\bpooler\b", "{module} makes one vector of the sequence, for a classifier"),
    _line(
        Block.OTHER,
        r"(text|visual)_projection:|contact_head\.|quantizer\b|\bproject_(hid|q):",
        "{module} serves the loss",
    ),
    _line(Block.OTHER, r"downsample\.reduction:|bottleneck\.", "{module} narrows the stream between layers"),
    _line(Block.OTHER, r"\.(probe|latents?)$", "{leaf} of {module}: the query that pools the sequence"),
    # Scales, gates and mixtures of the residual stream.
    _line(
        Block.OTHER,
        r"Hyper(Connection|Head)\.|hyper_connection|\bper_layer_(input_gate|projection):|[aA]lt[uU]p(_projections|_unembed_projections)?\.|AttentionResidual\.|\.layers\.\d+\.linear:",
        "{leaf} of {module}: mixes or joins residual streams",
    ),
    _line(
        Block.OTHER,
        r"(_residual|scale|scale_parameter|logit_bias|_gate|gate_bias|residual_bias|hidden_states_bias|layer_scalar|\.gamma\w*|lambda\w*)$",
        "{leaf} of {module}: scales a branch of the residual stream",
    ),
    _line(Block.OTHER, r"act_fn:", "{leaf} of {module}: the shape of an activation function"),
    _line(Block.OTHER, r"norm\w*\.mlp\.", "{module} gates the output of a norm"),
)
"""The table; the first line that matches counts."""


def named(where: str) -> Named | None:
    """The line for "path:Type.leaf"."""
    return next((line for line in NAMES if line.pattern.search(where)), None)
