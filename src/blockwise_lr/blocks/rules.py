"""The ordered rules: the first one that holds gives a parameter its block. Structure comes first, names last.

To add a rule, write one line here and one case in tests/support/cases.py or tests/support/handwritten_cases.py. A rule
by name belongs in `blocks/name_rules.py`, which applies after these. A rule must be certain: if a parameter only
resembles a block, leave it to the error that asks the user.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from blockwise_lr.blocks.attention_names import ATTENTION_NAMES
from blockwise_lr.blocks.block import Block
from blockwise_lr.blocks.model_facts import ModelFacts
from blockwise_lr.blocks.topology import CONVOLUTIONS, NORMS, Site, ancestors, matrix_shape

_NORM_NAME = re.compile(r".*norm(\d+d)?", re.IGNORECASE)
_TOKEN_NAME = re.compile(r"wte|tok(en)?s?_?(emb\w*|table)|embed_tokens|word_embeddings?")
_POSITION_LEAF = re.compile(r"(abs(olute)?_)?pos(ition)?(al)?_?emb(ed(ding)?s?)?(_table|_window|_?\d)?|wpe")
_FFN_AROUND = re.compile(
    r"(mlp|ffn|ff)(s|_block|_tokens?|_channels?|_in|_out|_?\d)?|feed_?forward|(shared_)?(experts?|mlp)"
)
_FFN_CHILD = re.compile(
    r"\d+|gate_proj|up_proj|down_proj|gate_up_proj|c_fc\d?|c_proj|fc_?\d|fc_(in|out)|w[123]|w[io](_\d)?"
    r"|dense_(h_to_4h|4h_to_h)|linear_fc\d|(lin(ear)?|layer|dense)_?\d|w_(in|out|\d)|proj_(up|up_gate|down)"
)
_EMBEDDER = re.compile(r"\w*_embedd(er|ing)")
_HEAD_NAME = re.compile(
    r"(\w+_)?head(\d+|_dist)?|unembed(ding)?|embed_out|score|classifier|proj_(out(_2)?|to_clip_embeddings)|output_layer|(to_)?logits|readout|decoder_pred"
)


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Args:
        block: the block of the parameters for which `test` holds.
        test: `test(site, facts)` returns whether the rule certainly applies.
        reason: why, in plain words. `{module}`, `{type}`, `{leaf}`, `{attention}`, `{layer}` and `{parts}` are
            filled in.
    """

    block: Block
    test: Callable[[Site, ModelFacts], bool]
    reason: str


def _makes(*parts: str) -> Callable[[Site, ModelFacts], bool]:
    """Return the test for parameters that make one of these attention parts, and nothing else."""

    def test(site: Site, facts: ModelFacts) -> bool:
        made = facts.parts(site)
        return len(made) == 1 and made[0] in parts

    return test


def _is_fused(site: Site, facts: ModelFacts) -> bool:
    return len(facts.parts(site)) > 1


def _is_norm_type(site: Site, facts: ModelFacts) -> bool:
    vector = site.param.ndim == 1
    return vector and (isinstance(site.module, NORMS) or _NORM_NAME.fullmatch(site.type_name) is not None)


def _is_lone_gain(site: Site, facts: ModelFacts) -> bool:
    """A 1-D weight (and bias) in a module without a matrix or children: a norm that the user wrote."""
    own = {leaf: p for leaf, p in site.module._parameters.items() if p is not None}
    shapes = {p.shape for p in own.values()}
    alone = not facts.tree.children.get(site.path) and set(own) in ({"weight"}, {"weight", "bias"})
    is_gain = alone and len(shapes) == 1 and site.param.ndim == 1 and site.param.numel() > 1
    return is_gain and not isinstance(site.module, nn.PReLU) and "scale" not in site.type_name.lower()


def _is_embedding(site: Site, facts: ModelFacts) -> bool:
    return site.path in facts.embeddings


def _is_declared_embedding(site: Site, facts: ModelFacts) -> bool:
    return _is_embedding(site, facts) and facts.is_declared(site.module, "get_input_embeddings")


def _is_position(site: Site, facts: ModelFacts) -> bool:
    return _is_embedding(site, facts) and facts.is_position(site.path)


def _is_relative_position(site: Site, facts: ModelFacts) -> bool:
    in_attention = not facts.attentions.isdisjoint(ancestors(site.path))
    return isinstance(site.module, nn.Embedding) and in_attention


def _is_segment(site: Site, facts: ModelFacts) -> bool:
    return _is_embedding(site, facts) and facts.is_segment(site.path)


def _is_token_table(site: Site, facts: ModelFacts) -> bool:
    return _is_embedding(site, facts) and facts.is_only_token_table(site.path)


def _is_tied_head(site: Site, facts: ModelFacts) -> bool:
    return facts.is_head(site) and facts.is_tied(site.module)


def _is_head(site: Site, facts: ModelFacts) -> bool:
    return facts.is_head(site)


def _is_feed_forward(site: Site, facts: ModelFacts) -> bool:
    return facts.layers.widens_and_narrows(site) and not _is_head_by_name(site, facts)


def _is_convolution(site: Site, facts: ModelFacts) -> bool:
    if not isinstance(site.module, CONVOLUTIONS):
        return False
    # A convolution in an attention that mixes channels may make q, k or v.
    return site.module.groups > 1 or not _in_attention_by_name(site, facts)


def _is_recurrent(site: Site, facts: ModelFacts) -> bool:
    return isinstance(site.module, (nn.RNNBase, nn.RNNCellBase))


def _is_in_mixer(site: Site, facts: ModelFacts) -> bool:
    return any(path in facts.mixers for path in (site.path, *ancestors(site.path)))


def _is_in_head(site: Site, facts: ModelFacts) -> bool:
    return any(path in facts.heads for path in (site.path, *ancestors(site.path)))


def _in_attention_by_name(site: Site, facts: ModelFacts) -> bool:
    """Whether a module around the parameter, within its layer, is named as an attention."""
    return ATTENTION_NAMES.search(facts.nesting.local(site.path)) is not None


def _is_feed_forward_by_name(site: Site, facts: ModelFacts) -> bool:
    inside = facts.nesting.local(site.path).split(".")[:-1]
    around = any(_FFN_AROUND.fullmatch(name) for name in inside) and not any(map(_EMBEDDER.fullmatch, inside))
    named = around and _FFN_CHILD.fullmatch(site.child) is not None
    return named and matrix_shape(site.module) is not None and not _in_attention_by_name(site, facts)


def _is_head_by_name(site: Site, facts: ModelFacts) -> bool:
    outside = not facts.nesting.in_layer(site.path)
    return outside and matrix_shape(site.module) is not None and _HEAD_NAME.fullmatch(site.child) is not None


def _is_in_head_by_name(site: Site, facts: ModelFacts) -> bool:
    """Whether a matrix, other than the output matrix, is in a module that is named as a head."""
    nesting = facts.nesting
    if matrix_shape(site.module) is None or nesting.in_layer(site.path):
        return False
    inside = nesting.local(site.path).split(".")[:-1]
    heads = (i for i, name in enumerate(inside) if _HEAD_NAME.fullmatch(name))
    around = [site.path.rsplit(".", len(inside) - i)[0] for i in heads]
    return any(path not in nesting.around_table | nesting.around_attention for path in around)


def _is_expert_stack(site: Site, facts: ModelFacts) -> bool:
    stack = site.param.ndim >= 2 and site.type_name.endswith("Experts")
    return stack and not _in_attention_by_name(site, facts)


def _is_router(site: Site, facts: ModelFacts) -> bool:
    return site.type_name.endswith("Router")


def _is_token_table_by_name(site: Site, facts: ModelFacts) -> bool:
    return _is_embedding(site, facts) and _TOKEN_NAME.fullmatch(site.child) is not None


def _is_position_by_name(site: Site, facts: ModelFacts) -> bool:
    return _POSITION_LEAF.fullmatch(site.leaf) is not None


RULES: tuple[Rule, ...] = (
    # By topology and type.
    Rule(Block.NORM, _is_norm_type, "{leaf} of {module}, a {type}"),
    Rule(Block.QK, _makes("q"), "makes the queries of the attention {attention}"),
    Rule(Block.QK, _makes("k"), "makes the keys of the attention {attention}"),
    Rule(Block.VO, _makes("v"), "makes the values of the attention {attention}"),
    Rule(Block.VO, _makes("o"), "makes the output of the attention {attention}"),
    Rule(Block.VO, _makes("gate"), "makes the output gate of the attention {attention}"),
    Rule(
        Block.VO,
        _makes("latent", "kv"),
        "makes {parts} of the attention {attention}: the sharper block of the two",
    ),
    Rule(
        Block.QKV,
        _is_fused,
        "makes {parts} of the attention {attention} in one fused weight (see split_fused)",
    ),
    Rule(Block.POS, _is_relative_position, "an embedding inside an attention: relative positions"),
    Rule(Block.EMB, _is_declared_embedding, "the embedding that get_input_embeddings returns"),
    Rule(Block.POS, _is_position, "{module} is a position embedding, by its size or its name"),
    Rule(Block.EMB, _is_segment, "{module} is an embedding of token types"),
    Rule(Block.EMB, _is_token_table, "{module} is the token embedding, by its size or as the only embedding"),
    Rule(
        Block.EMB, _is_tied_head, "belongs to the output head {module}, which shares the embedding's weight"
    ),
    Rule(Block.HEAD, _is_head, "{module} maps to the vocabulary and shares no weight with an embedding"),
    Rule(
        Block.FFN,
        _is_feed_forward,
        "{module} is a feed-forward matrix: it widens or narrows, and another in {layer} does the reverse",
    ),
    Rule(Block.FFN, _is_expert_stack, "{leaf} of {module}, a {type}: stacked feed-forward experts"),
    Rule(Block.ROUTER, _is_router, "{leaf} of {module}, a {type}"),
    Rule(Block.NORM, _is_lone_gain, "{module} holds only a vector: the gain or bias of a norm"),
    Rule(Block.CONV, _is_convolution, "{module} is a convolution"),
    Rule(Block.SSM, _is_recurrent, "{leaf} of {module}, a {type}: a recurrence that mixes the sequence"),
    Rule(Block.SSM, _is_in_mixer, "{leaf} of {module}: in a sequence mixer other than attention"),
    Rule(
        Block.HEAD,
        _is_in_head,
        "{module} is in the output head, before the matrix that maps to the vocabulary",
    ),
    # By name.
    Rule(Block.EMB, _is_token_table_by_name, "an embedding named like a token embedding"),
    Rule(Block.POS, _is_position_by_name, "named like a position embedding"),
    Rule(Block.FFN, _is_feed_forward_by_name, "a matrix named like one of a feed-forward layer"),
    Rule(Block.HEAD, _is_head_by_name, "an output head, by its name and position outside all layers"),
)

LAST_RULES: tuple[Rule, ...] = (
    # These apply after the rules by name.
    Rule(
        Block.HEAD,
        _is_in_head_by_name,
        "{module} is part of an output head, by its name and position outside all layers",
    ),
)
