"""Recognise attention modules and their linear layers by name."""

from __future__ import annotations

import re

from blockwise_lr.blocks.topology import Tree, has_heads

# Role of a linear layer -> its names. Shapes cannot tell three square matrices apart, so names decide.
_NAMES = {
    "q": "q wq w_q c_q query w_query q_proj query_proj to_q project_q projection_query q_lin q_attn q_head query_key "
    "query_global pos_q_proj pos_query_proj q_a_proj q_b_proj wq_a wq_b q_gate_proj add_q_proj linear_q",
    "k": "k wk w_k c_k key w_key k_proj key_proj to_k project_k projection_key k_lin k_attn k_head key_global "
    "pos_k_proj pos_key_proj add_k_proj",
    "v": "v wv w_v c_v value w_value v_proj value_proj to_v project_v projection_value v_lin v_attn v_head "
    "value_global v_proj_current v_proj_delayed add_v_proj",
    "kv": "kv wkv kv_proj to_kv key_value linear_kv",
    "latent": "kv_a_proj kv_a_proj_with_mqa wkv_a kv_b_proj wkv_b",
    "qkv": "qkv wqkv qkv_proj c_attn in_proj in_proj_qkv in_proj_qkvz query_key_value w_pack to_qkv linear_qkv",
    "o": "o wo w_o o_proj out_proj o_a_proj o_b_proj out_lin to_out dense attention_out c_proj proj post_proj "
    "to_add_out linear_proj",
    "gate": "g gate g_proj gate_proj g_a_proj g_b_proj output_gate in_proj_z ogate_preact",
}
ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
# The name of one parameter with all matrices of an attention, as in modded-nanogpt.
STACKED = re.compile(r"(qkvo?)_w(eight)?")
# A module without a number of heads is an attention only if its class or attribute name matches.
ATTENTION_NAMES = re.compile(r"attn|attention|qkv", re.IGNORECASE)
# An indexer chooses the keys that an attention sees. It has queries and keys of its own but is a router.
INDEXER = re.compile(r"\w*Indexer\w*")


def role_of(path: str) -> str | None:
    """Return what a linear layer in an attention makes, by its name alone; None if the name is unknown."""
    return ROLES.get(path.rpartition(".")[2].lower())


def is_attention_like(tree: Tree, path: str) -> bool:
    """Return whether a module looks like an attention, known or unknown: it contains nothing feed-forward."""
    module = tree.modules[path]
    named = (type(module).__name__, path.rpartition(".")[2])
    return has_heads(module) or any(ATTENTION_NAMES.search(name) for name in named)
