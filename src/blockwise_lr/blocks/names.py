"""What is known by its name alone, after everything that topology and types decide (`blocks/rules.py`).

One line a kind of parameter: its block, why, and patterns. A pattern is searched in "Around .path:Type.leaf", such as
"GptOssDecoderLayer .self_attn:GptOssAttention.sinks": the class of the module around the owner, the owner's path within
its layer (or, outside of layers, within the model) and class, and what it calls the parameter. A name that other models may use for something else is bound
to the class that it was seen in. To add a kind, write one line here and one case in tests/cases_by_hand.py.
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


def _line(block: Block, reason: str, *patterns: str) -> Named:
    return Named(block, re.compile("|".join(patterns)), reason)


NAMES: tuple[Named, ...] = (
    # Of attention, beside its matrices.
    _line(Block.ROUTER, "{leaf} of {module}: chooses the keys that attention sees", r"Indexer", r"\bindexer[.:]"),
    _line(Block.VO, "{module} pools keys and values: the sharper block of the two", r"Compressor\b.*\.weight$"),
    _line(Block.QK, "makes the queries of relative positions in {module}", r"^Inkling\w* .*attn\.r_proj:"),
    _line(Block.QK, "{leaf} of {module}: makes or moves its queries or keys",
          r":XLNet\w*Attention\.(q|k|r)$", r":\w*Attention\.(q_bias|r_kernel|r_\w_bias)$"),
    _line(Block.VO, "{leaf} of {module}: makes or moves its values or output",
          r":XLNet\w*Attention\.[vo]$", r":\w*Attention\.(v_bias|dense_bias)$", r":\w*MoA\.bias$", r"\.ve_gate:"),
    _line(Block.QK, "makes the queries of the attention experts {module}", r"attention\.experts\.input_linear:"),
    _line(Block.VO, "makes the output of the attention experts {module}", r"attention\.experts\.output_linear:"),
    _line(Block.OTHER, "{leaf} of {module}: sinks of the attention", r"\.sinks?$", r"attn\.sink_proj:"),
    _line(Block.OTHER, "{leaf} of {module}: weighs two attentions that are subtracted", r"attn:\w+\.lambda_[qk]\d$"),
    _line(Block.OTHER, "{leaf} of {module}: makes the attention's mask",
          r":DogeAttention\.A$", r"^Doge\w* .*\.dt_proj:"),
    _line(Block.POS, "{leaf} of {module}: positions",
          r"\.rel(ative)?_(pos|attention_bias|position_bias)\w*$", r"\.position_bias$", r"\brelative_pos\w*[.:]",
          r"(RelativeAttentionBias|RelativeLogits)[. ]", r"position_embeddings\.weights:", r"(position_bias|cpb)_mlp\.",
          r"Attention\.seg_embed$"),
    # Mixtures of experts.
    _line(Block.ROUTER, "{module} chooses experts, or how much of one",
          r"shared_expert_gate:", r"\brouter\w*[.:]", r"Router\b", r"TopKGating", r"^\w*Gate .*\bmlp\.gate\.\w+:"),
    _line(Block.FFN, "{leaf} of {module}: of the feed-forward experts",
          r":\w*(MoE|Experts)\.\w*bias$", r":\w*ExpertGLU\."),
    # Sequence mixers that are no attention.
    _line(Block.CONV, "{leaf} of {module}: a convolution's", r"ShortConv", r":\w*Conv\.b\d$"),
    _line(Block.SSM, "{module} makes a gate of an xLSTM's memory", r"^xLSTM\w* .*\.[if]gate_preact:"),
    _line(Block.OTHER, "{leaf} of {module}: how much of the token before is mixed in",
          r":Rwkv\w*\.time_mix_", r"\bsmear_gate:"),
    # Feed-forward.
    _line(Block.FFN, "{module} is a matrix of RWKV's channel mixing",
          r"^Rwkv\w* .*feed_forward\.(key|value|receptance):"),
    _line(Block.FFN, "a matrix named as a feed-forward layer's",
          r"\b(shared_)?mlps?\.(\d+\.)?((in|out)put_linear|\w+\.linear):", r"\battn_pool\.mlp\.fc\d:",
          r"(?<!attention)\.(intermediate|output)\.dense:"),
    _line(Block.FFN, "{module}, a pointwise convolution, widens or narrows as a feed-forward does", r"\.pwconv\d:"),
    _line(Block.NORM, "{leaf} of {module}, a {type}: global response normalization", r":\w*GRN\.(weight|bias)$"),
    # Embeddings, and what leads from them to the model's width.
    _line(Block.EMB, "{leaf} of {module}: the embedding of one token",
          r"\.(cls|mask|masked_spec|dist|class|distillation|register|reg)_(token|emb|embed|embedding)s?$"),
    _line(Block.EMB, "{module} is an embedding: rows that are looked up by index",
          r"^(?!.*(attn|attention)).*:\w*Embedding\.weight$"),
    _line(Block.OTHER, "{module} leads from an embedding, or another modality, to the model's width",
          r"(projector|img_projection_\w+|vision_embed_tokens|feature_projection)(\.\w+)?:",
          r"multi_?modal_proj\w*[.:]",
          r"\.?embed\w*_proj(ect|ection)?:", r"\bproject_(in|out):", r"hidden_mapping\w*:", r"map_inputs_layer:",
          r"\bper_layer_model_projection:", r"_proj_for_\w+:", r"feature_extensor$", r"patch_embedding:",
          r"embeddings\.projection:", r"decoder_embed:", r"^Phi4Multimodal\w* .*\bembed\.out:"),
    # Heads.
    _line(Block.HEAD, "{module} is in an output head",
          r"[ .](\w*predictions?|lm_head|head|prediction_head)\.(\w+\.)*dense\w*:", r"[ .](\w+_)?heads?\.\d+:",
          r"[ .]head(\.fc|_dist):", r"vocab_transform:", r"decoder_pred:"),
    _line(Block.OTHER, "{module} makes one vector of the sequence, for a classifier", r"\bpooler[.:]"),
    _line(Block.OTHER, "{leaf} of {module}: the query that pools the sequence", r"\.(probe|latent)$"),
    _line(Block.OTHER, "{leaf} of {module} serves the loss",
          r"(text|visual)_projection(\.\d+)?:", r"contact_head\.", r"Quantizer\b", r"quantizer\.",
          r"\bproject_(hid|q):",
          r"\.logit_(bias|scale)$"),
    _line(Block.OTHER, "{module} narrows the stream between layers", r"downsample\.reduction:"),
    # Scales, gates and mixtures of the residual stream.
    _line(Block.OTHER, "{leaf} of {module}: mixes or joins residual streams",
          r"Hyper(Connection|Head)\b", r"hyper_connection\w*[.:]", r"AltUp\b", r"\baltup_\w+\.", r"AttentionResidual\.",
          r"\bper_layer_(input_gate|projection):", r"^Zamba\w* .*\.linear:"),
    _line(Block.OTHER, "{leaf} of {module}: scales a branch of the residual stream",
          r"\.(\w+_)?scale(_parameter)?$", r"\.\w+_(residual|gate)$", r"\.\w*(gate|residual|hidden_states)_bias$",
          r"\.layer_scalar$", r"\.\w+_lambdas?$", r"(LayerScale|Layer|Block)\.(gamma|lambda)_?\d?$"),
    _line(Block.OTHER, "{leaf} of {module}: the shape of an activation function", r"\bact_fn:"),
    _line(Block.OTHER, "{module} gates the output of a norm", r"^\w*GateMLP .*norm\.mlp\."),
)  # fmt: skip
"""The table; the first line that matches counts."""


def named(where: str) -> Named | None:
    """The line for "Around path:Type.leaf"."""
    return next((line for line in NAMES if line.pattern.search(where)), None)
