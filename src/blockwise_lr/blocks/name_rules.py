"""The rules by name, which apply after those by topology and type (`blocks/rules.py`).

Each line is one kind of parameter: its block, the reason, and patterns. A pattern is searched in
"Parent .path:Type.leaf", such as "GptOssDecoderLayer .self_attn:GptOssAttention.sinks": the class of the owner's
parent, the owner's path and class, and the attribute name of the parameter. The path is relative to the owner's layer
or, outside layers, to the model (`blocks/nesting.py`). A name that other models may use for something else is bound to
the class in which it occurs. To add a kind, write one line here and one case in tests/support/cases_by_hand.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from blockwise_lr.blocks.block import Block


class NameRule(NamedTuple):
    """One line of the table.

    Args:
        block: the block of the parameters that match.
        pattern: searched in "Parent .path:Type.leaf".
        reason: why, in words; it may use the fields of :class:`~blockwise_lr.blocks.rules.Rule`'s reason.
    """

    block: Block
    pattern: re.Pattern[str]
    reason: str


def _line(block: Block, reason: str, *patterns: str) -> NameRule:
    return NameRule(block, re.compile("|".join(patterns)), reason)


NAMES: tuple[NameRule, ...] = (
    # Attention, except its matrices.
    _line(Block.ROUTER, "{leaf} of {module}: chooses the keys that the attention sees", r"Indexer", r"\bindexer[.:]"),
    _line(Block.VO, "{module} pools keys and values: VO, the sharper block of the two", r"Compressor\b.*\.weight$"),
    _line(Block.QK, "makes the queries of the relative positions in {module}", r"^Inkling\w* .*attn\.r_proj:"),
    _line(Block.QK, "{leaf} of {module}: makes its queries or keys, or adds to them",
          r":XLNet\w*Attention\.(q|k|r)$", r":\w*Attention\.(q_bias|r_kernel|r_\w_bias)$"),
    _line(Block.VO, "{leaf} of {module}: makes its values or output, or adds to them",
          r":XLNet\w*Attention\.[vo]$", r":\w*Attention\.(v_bias|dense_bias)$", r":\w*MoA\.bias$",
          r"\.(ve|attn|value_embed)_gate:"),
    _line(Block.VO, "{module} makes the joint output of attention and feed-forward: VO, the sharper block of the two",
          r"^\w*SingleTransformerBlock \.proj_out:"),
    _line(Block.FFN, "{module} is the up projection of a feed-forward parallel to an attention",
          r"^\w*SingleTransformerBlock \.proj_mlp:"),
    _line(Block.OTHER, "{module} mixes the scores of the heads (talking heads)", r"^TalkingHeadAttn .*\.proj_[lw]:"),
    _line(Block.CONV, "{module} shortens the sequence from which keys and values are computed", r"\battn\.sr:Conv"),
    _line(Block.QK, "makes the queries of the attention experts {module}", r"attention\.experts\.input_linear:"),
    _line(Block.VO, "makes the output of the attention experts {module}", r"attention\.experts\.output_linear:"),
    _line(Block.OTHER, "{leaf} of {module}: attention sinks", r"\.sinks?$", r"attn\.sink_proj:"),
    _line(Block.OTHER, "{leaf} of {module}: weights of two attentions in their difference",
          r"attn:\w+\.lambda_[qk]\d$"),
    _line(Block.OTHER, "{leaf} of {module}: computes the attention's mask",
          r":DogeAttention\.A$", r"^Doge\w* .*\.dt_proj:"),
    _line(Block.POS, "{leaf} of {module}: encodes positions",
          r"\.rel(ative)?_(pos|attention_bias|position_bias)\w*$", r"\.position_bias$", r"\brelative_pos\w*[.:]",
          r"(RelativeAttentionBias|RelativeLogits)[. ]", r"position_embeddings\.weights:",
          r"(position_bias|cpb|meta)_mlp\.",
          r"Attention\.seg_embed$", r"\.attention_biases$", r"\brel_pos\.mlp\.", r":TNT\.(patch|pixel)_pos$",
          r"\.pos_frequencies$"),
    # Conditioning of diffusion models.
    _line(Block.HEAD, "{module} computes the model's output after an adaptive norm",
          r"^LuminaLayerNormContinuous \.norm_out\.linear_2:", r"\bfinal_layer\.(linear|proj_out):"),
    _line(Block.OTHER, "{leaf} of {module}: computes gates, and scales and shifts of norms, from the conditioning",
          r"^\w*(Ada\w*Norm|RMSNormZero|LayerNormZero|LayerNormContinuous|PreFinalBlock)\w* .*\.linear(_1)?:",
          r"\badaLN_modulation\.\d+:", r"[._ ](mod|modulation)\.(\d+|lin(ear)?):", r"\.scale_shift_table$",
          r"^DiTTransformer2DModel \.proj_out_1:", r"TimeTextImageEmbedding .*\.time_proj:"),
    _line(Block.OTHER, "{module} computes the conditioning: an embedding of the timestep, a class or a text",
          r"^Timestep(Embedding|Embedder) ", r"^PixArtAlphaTextProjection ", r"^\w*Combined\w*Embed\w* ",
          r"^MLPEmbedder ", r"\b(t|time|timestep|guidance|vector|caption|extra|text|y)_embedder\.(mlp\.)?\d+:",
          r"\.time_emb_proj:", r"\b(time_caption_embed|timestep_proj|global_proj|cross_attention_proj)\.(\w+\.)*\d+:"),
    # Mixtures of experts.
    _line(Block.ROUTER, "{module} chooses experts or their weights",
          r"shared_expert_gate:", r"\brouter\w*[.:]", r"Router\b", r"TopKGating", r"^\w*Gate .*\bmlp\.gate\.\w+:"),
    _line(Block.FFN, "{leaf} of {module}: belongs to the feed-forward experts",
          r":\w*(MoE|Experts)\.\w*bias$", r":\w*ExpertGLU\."),
    # Sequence mixers other than attention.
    _line(Block.CONV, "{leaf} of {module}: belongs to a convolution", r"ShortConv", r":\w*Conv\.b\d$"),
    _line(Block.SSM, "{module} mixes the tokens instead of an attention",
          r"^(RNN|LSTM)2d .*\.fc:", r"^SpatialGatingUnit ", r"\.linear_tokens:"),
    _line(Block.SSM, "{module} computes a gate of an xLSTM's memory", r"^xLSTM\w* .*\.[if]gate_preact:"),
    _line(Block.OTHER, "{leaf} of {module}: weight with which the previous token is mixed in",
          r":Rwkv\w*\.time_mix_", r"\bsmear_gate:"),
    _line(Block.OTHER, "{module} gates a connection between layers", r"\bskip_gate:"),
    # Feed-forward.
    _line(Block.FFN, "{module} is a matrix of RWKV's channel mixing",
          r"^Rwkv\w* .*feed_forward\.(key|value|receptance):"),
    _line(Block.FFN, "a matrix named like one of a feed-forward layer",
          r"\b(shared_)?mlps?\.(\d+\.)?((in|out)put_linear|\w+\.linear):", r"\battn_pool\.mlp\.fc\d:",
          r"(?<!attention)\.(intermediate|output)\.dense:",
          r"\.(mlp|ffn|ff|feed_forward)\w*:\w*(MLP|Mlp|FeedForward|FFN)\w*\.(c_fc|c_proj|w_?\d|fc_?\d|\w*(up|down))$"),
    _line(Block.NORM, "{leaf} of {module}: a norm that is fused with a matrix",
          r"\.layer_?norm_(weight|bias)$"),
    _line(Block.NORM, "{leaf} of {module}: gains and biases in place of a norm", r":Affine\.(alpha|beta)$"),
    _line(Block.FFN, "{module} is a pointwise convolution that widens or narrows like a feed-forward layer",
          r"\.pwconv\d:"),
    _line(Block.NORM, "{leaf} of {module}, a {type}: global response normalization", r":\w*GRN\.(weight|bias)$"),
    # Embeddings, and matrices from their width to the model's.
    _line(Block.EMB, "{leaf} of {module}: the embedding of a special token",
          r"\.(cls|mask|masked_spec|dist|class|distillation|register|reg|pad|prd)_(token|emb|embed|embedding)s?(_?\d)?$"),
    _line(Block.EMB, "{module} is an embedding: its rows are looked up by index",
          r"^\S+ (?!\S*(attn|attention))\S*:\w*Embedding\.weight$"),
    _line(Block.OTHER, "{module} projects an embedding, or another modality, to the model's width",
          r"(projector|img_projection_\w+|vision_embed_tokens|feature_projection)(\.\w+)?:",
          r"multi_?modal_proj\w*[.:]",
          r"\.?embed\w*_proj(ect|ection)?:", r"\bproject_(in|out):", r"hidden_mapping\w*:", r"map_inputs_layer:",
          r"\bper_layer_model_projection:", r"_proj_for_\w+:", r"feature_extensor$", r"patch_embedding:",
          r"embeddings\.projection:", r"decoder_embed:", r"^Phi4Multimodal\w* .*\bembed\.out:",
          r"\b(context|x|caption|image)_embedder(\.proj)?:", r"\b(img|txt)_in:",
          r"^\w*(Model|DiT|Embedder|Refiner|Transformer) \.proj_in:",
          r"\b(text|encoder_hidden_states)_proj:", r"^\w*PatchEmbed\w* .*\.proj:\w*Linear", r"\bembeds\.proj:Linear",
          r"^Transformer2DModel \S*\.proj_(in|out):", r"\bcaption_projection:",
          r"\bprompt_encoder\.\w+\.(mlp_head|transform)\.\d+:"),
    # Heads.
    _line(Block.HEAD, "{module} is part of an output head",
          r"[ .](\w*predictions?|lm_head|head|prediction_head)\.(\w+\.)*dense\w*:", r"[ .](\w+_)?heads?\.\d+:",
          r"[ .]head(\.fc|_dist):", r"vocab_transform:", r"decoder_pred:"),
    _line(Block.OTHER, "{module} pools the sequence into one vector for a classifier", r"\bpooler[.:]"),
    _line(Block.OTHER, "{leaf} of {module}: the query that pools the sequence", r"\.(probe|latent)$"),
    _line(Block.OTHER, "{leaf} of {module} is used only for the loss",
          r"(text|visual)_projection(\.\d+)?:", r"contact_head\.", r"Quantizer\b", r"quantizer\.",
          r"\bproject_(hid|q):",
          r"\.logit_(bias|scale)$", r"(Attn|Attention|XCA)\.temperature$"),
    _line(Block.OTHER, "{module} changes the width of the residual stream between layers",
          r"downsample\.reduction:", r"\bpool\.fc:",
          r"^(Hiera|MultiScale)Block \.proj:", r"\.shortcut_proj_\w+:"),
    _line(Block.OTHER, "{module} projects from the width of one branch to that of another",
          r"\b(revert_)?projs\.\d+\.\d+:"),
    # Scales, gates and mixtures of the residual stream.
    _line(Block.OTHER, "{leaf} of {module}: mixes or joins residual streams",
          r"Hyper(Connection|Head)\b", r"hyper_connection\w*[.:]", r"AltUp\b", r"\baltup_\w+\.", r"AttentionResidual\.",
          r"\bper_layer_(input_gate|projection):", r"^Zamba\w* .*\.linear:"),
    _line(Block.OTHER, "{leaf} of {module}: scales a branch of the residual stream",
          r"\.(\w+_)?scale(_parameter)?$", r"\.\w+_(residual|gate)$", r":\w*DiTBlock\.gate$",
          r"\.\w*(gate|residual|hidden_states)_bias$",
          r"\.layer_scalar$", r"\.(\w+_)?lambdas?$", r"(LayerScale|Layer|Block)\w*\.(gamma|lambda)(_?\d|_\w+)?$",
          r":GPT\.(scalars|skip_weights)$", r":\w*Block\.ls_?\d$"),
    _line(Block.OTHER, "{leaf} of {module}: a parameter of an activation function", r"\bact_fn:", r":StarReLU\."),
    _line(Block.OTHER, "{module} gates the output of a norm", r"^\w*GateMLP .*norm\.mlp\."),
)  # fmt: skip
"""The table. The first line that matches counts."""


def name_rule(where: str) -> NameRule | None:
    """Return the first line that matches "Parent .path:Type.leaf", or None."""
    return next((line for line in NAMES if line.pattern.search(where)), None)
