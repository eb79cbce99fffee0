"""The layouts of fused weights in known classes, where they differ from all of q, then all of k, then all of v.

To add a class, write one line in `LAYOUTS` and one case in tests/support/cases.py. A weight does not show its layout,
so a line is relied on only for the classes in `blocks/trusted_classes.py`. For any other class the line is a first
guess at the parts, and the layout must be stated or shown by a run (`blocks/resolved_layouts.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from blockwise_lr.blocks.layout import Layout

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_local_heads")


Rule = Callable[[nn.Module, int], Layout]
"""`rule(attention, width)` returns the layout of a weight with `width` outputs."""


def setting(module: nn.Module, *names: str) -> int:
    """Return the first of these integer settings that a module or its configuration has; 0 if none exists."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(value := getattr(holder, name, None), int) and not isinstance(value, bool):
                return value
    return 0


def _by_head(*parts: str) -> Rule:
    """Return the rule for equal parts that alternate head by head."""

    def rule(attention: nn.Module, width: int) -> Layout:
        heads = setting(attention, *HEADS)
        equal = tuple((part, width // len(parts)) for part in parts)
        return Layout(equal, heads if heads and width % (heads * len(parts)) == 0 else None)

    return rule


def _falcon(attention: nn.Module, width: int) -> Layout:
    """Group by group (queries, their key and value); or all queries, one key, one value; or head by head."""
    heads, head_dim = setting(attention, "num_heads"), setting(attention, "head_dim")
    if not (
        getattr(attention, "new_decoder_architecture", False) or getattr(attention, "multi_query", False)
    ):
        return _by_head("q", "k", "v")(attention, width)
    groups = setting(attention, "num_kv_heads")
    return Layout((("q", heads * head_dim), ("k", groups * head_dim), ("v", groups * head_dim)), groups)


def _codegen(attention: nn.Module, width: int) -> Layout:
    """Four shards, one for each TPU core of the training, with the values before the keys."""
    return Layout((("q", width // 3), ("v", width // 3), ("k", width // 3)), 4)


def _bigcode(attention: nn.Module, width: int) -> Layout:
    if not getattr(attention, "multi_query", False):
        return _by_head("q", "k", "v")(attention, width)
    keys = setting(attention, "kv_dim")
    return Layout((("q", width - 2 * keys), ("k", keys), ("v", keys)))


def _litgpt(attention: nn.Module, width: int) -> Layout:
    """Group by group: the queries of a group, their key and value. LitGPT's older `attn` weight, and Megatron's."""
    heads = setting(attention, "n_head", "num_attention_heads")
    groups = setting(attention, "n_query_groups", "num_query_groups")
    size = width // (heads + 2 * groups) if heads else 0
    parts = (("q", heads * size), ("k", groups * size), ("v", groups * size))
    return Layout(parts, groups) if groups else Layout(_thirds(width), None)


def _latent_and_rope(attention: nn.Module, width: int) -> Layout:
    """MLA: the latent of all keys and values, then the rotated part of the key that all heads share."""
    rope = setting(attention, "qk_rope_head_dim")
    return Layout((("latent", width - rope), ("k", rope)) if rope else (("latent", width),))


def _keys_and_values_of_heads(attention: nn.Module, width: int) -> Layout:
    """MLA, from the latent: the key without rotation and the value, head by head."""
    heads, values = setting(attention, *HEADS), setting(attention, "v_head_dim")
    keys = width // heads - values if heads else 0
    known = heads and values and keys > 0 and width % heads == 0
    return Layout((("k", keys * heads), ("v", width - keys * heads)), heads if known else None)


def _query_and_gate_of_heads(attention: nn.Module, width: int) -> Layout:
    """The query and the gate of the head's output, head by head."""
    heads = setting(attention, *HEADS)
    gate = setting(attention, "v_head_dim", "head_dim")
    known = heads and gate and width % heads == 0 and width > heads * gate
    return Layout((("q", width - heads * gate), ("gate", heads * gate)), heads if known else None)


def _delta_qkv(attention: nn.Module, width: int) -> Layout:
    keys, values = setting(attention, "key_dim"), setting(attention, "value_dim")
    return Layout((("q", keys), ("k", keys), ("v", values)))


def _delta_qkvz(attention: nn.Module, width: int) -> Layout:
    """Group of heads by group: query, key, values, output gates."""
    keys, values = setting(attention, "key_dim"), setting(attention, "value_dim")
    return Layout(
        (("q", keys), ("k", keys), ("v", values), ("gate", values)), setting(attention, "num_k_heads")
    )


# Pattern of "Class.child" -> rule. The first match counts.
LAYOUTS: tuple[tuple[re.Pattern[str], Rule], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"Falcon(Flash)?Attention\.query_key_value", _falcon),
        (r"(GPTNeoX|Bloom|Persimmon)\w*\.query_key_value", _by_head("q", "k", "v")),
        (r"MiniMaxLightningAttention\.qkv_proj|DisentangledSelfAttention\.in_proj", _by_head("q", "k", "v")),
        (r"CodeGenAttention\.qkv_proj", _codegen),
        (r"GPTBigCodeAttention\.c_attn", _bigcode),
        (r"CausalSelfAttention\.attn|SelfAttention\.linear_qkv", _litgpt),
        (r".*\.(kv_a_proj_with_mqa|kv_a_proj|wkv_a)", _latent_and_rope),
        (r".*\.(kv_b_proj|wkv_b)", _keys_and_values_of_heads),
        (r"DeepseekV4Attention\.kv_proj", lambda attention, width: Layout((("kv", width),))),
        (r"Qwen\w+Attention\.q_proj|\w+\.q_gate_proj", _query_and_gate_of_heads),
        (r"\w*GatedDeltaNet\.in_proj_qkv", _delta_qkv),
        (r"\w*GatedDeltaNet\.in_proj_qkvz", _delta_qkvz),
        # Other classes with these names use some layout by head or by shard.
        (r".*\.(query_key_value|linear_qkv)", lambda attention, width: Layout(_thirds(width), None)),
    )
)


def _heads_of_two_sizes(attention: nn.Module, width: int) -> Layout | None:
    """LeViT, TinyViT and EfficientFormer: head by head, with values that may be wider than the keys."""
    heads, keys, values = (setting(attention, name) for name in ("num_heads", "key_dim", "val_dim"))
    if not heads or not keys or not values:
        return None
    sizes = {
        2 * keys + values: (("q", keys), ("k", keys), ("v", values)),
        keys + values: (("k", keys), ("v", values)),
    }
    parts = sizes.get(width // heads) if width % heads == 0 else None
    return Layout(tuple((part, heads * size) for part, size in parts), heads) if parts else None


def _thirds(width: int) -> tuple[tuple[str, int], ...]:
    return tuple((part, width // 3) for part in ("q", "k", "v"))


def known_layout(attention: nn.Module, child: str, width: int) -> Layout | None:
    """Return the layout of the weight named `child` in `attention`; None if the table has no line for it.

    Args:
        attention: the attention module.
        child: the attribute name of the linear layer.
        width: its number of outputs.
    """
    key = f"{type_before_parametrizations(attention).__name__}.{child}"
    found = next((rule(attention, width) for pattern, rule in LAYOUTS if pattern.fullmatch(key)), None)
    fused = child in ("qkv", "kv")
    return found or (_heads_of_two_sizes(attention, width) if fused else None)
