"""Finding the attention modules of a model, and what each of their matrices makes: q, k, v or the output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate, permutations

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from blockwise_lr.blocks.block import Block
from blockwise_lr.blocks.topology import Tree, has_heads, output_dim

PART_BLOCKS = {"q": Block.QK, "k": Block.QK, "v": Block.VO, "o": Block.VO}
PART_WORDS = {"q": "queries", "k": "keys", "v": "values", "o": "output"}

# Shapes alone cannot tell three square matrices apart: here, and only here, names decide.
QUERY_KEY_VALUE = {
    "q": re.compile(r"q_proj|q_lin|q_attn|query|query_proj|wq|to_q|q"),
    "k": re.compile(r"k_proj|k_lin|k_attn|key|key_proj|wk|to_k|k"),
    "v": re.compile(r"v_proj|v_lin|v_attn|value|value_proj|wv|to_v|v"),
}
# A module that does not say how many heads it has is an attention only if its names say so.
ATTENTION_NAMES = re.compile(r"attn|attention|qkv", re.IGNORECASE)

# "Class.child" of the fused weights whose rows are not all of q, then all of k, then all of v.
INTERLEAVED = (
    re.compile(r".*\.query_key_value"),  # GPT-NeoX, Bloom, Falcon, Persimmon: by head
    re.compile(r"CodeGenAttention\.qkv_proj"),  # by model-parallel shard
    re.compile(r"GPTBigCodeAttention\.c_attn"),  # by head, unless multi-query
    re.compile(r"MiniMax\w*Attention\.qkv_proj"),  # by head
)


@dataclass(frozen=True)
class Projection:
    """What one parameter of an attention module makes.

    Args:
        attention: the attention module's path.
        parts: (part, width) in the order in which they lie in the parameter; "q", "k", "v" or "o".
        dim: the dimension along which the parts follow one another.
        interleaved: the parts lie head by head (or shard by shard) instead of one after another.
    """

    attention: str
    parts: tuple[tuple[str, int], ...]
    dim: int
    interleaved: bool = False

    @property
    def fused(self) -> bool:
        return len(self.parts) > 1

    @property
    def slices(self) -> dict[str, tuple[int, int, int]] | None:
        """part -> (dimension, start, length), None where the parts are not in one piece each."""
        if self.interleaved:
            return None
        starts = accumulate((width for _, width in self.parts), initial=0)
        return {part: (self.dim, start, width) for (part, width), start in zip(self.parts, starts)}


def find_projections(tree: Tree) -> dict[tuple[str, str], Projection]:
    """The parameters of all attention modules: (path of the owner, parameter's own name) -> what it makes.

    An attention module is torch's nn.MultiheadAttention; or has linear layers for q, k and v, and no more
    than one other, as wide as the queries; or has exactly one linear layer whose outputs are as many as q, k
    and v and another one that takes as many inputs as there are queries. What only resembles these is left to
    be reported as unknown.
    """
    found: dict[tuple[str, str], Projection] = {}
    for path, module in tree.modules.items():
        if isinstance(module, nn.MultiheadAttention):
            found.update(_torch_attention(path, module))
            continue
        matrices = tree.matrices(path)
        if len(matrices) < 2:
            continue
        parts = _separate(matrices) or _fused(tree, path, matrices)
        for child, made in parts.items():
            found.update(_of_linear(path, child, tree.modules[child], made, _is_interleaved(module, child)))
    return found


_Parts = dict[str, tuple[tuple[str, int], ...]]


def _separate(matrices: dict[str, tuple[int, int]]) -> _Parts:
    """q, k and v as linear layers of their own, or q beside a fused k and v (cross-attention)."""
    roles = {
        role: child for role, names in QUERY_KEY_VALUE.items() for child in matrices if _named(child, names)
    }
    rest = [child for child in matrices if child not in roles.values()]
    if "q" not in roles:
        return {}
    width = matrices[roles["q"]][1]
    parts: _Parts = {child: ((role, matrices[child][1]),) for role, child in roles.items()}
    if len(roles) == 3:
        # A query wider than the output projection (a gate lies in it, say) is no plain attention.
        if len(rest) > 1 or any(matrices[child][0] != width for child in rest):
            return {}
        return parts | {child: (("o", matrices[child][1]),) for child in rest}
    if len(roles) == 1 and len(rest) == 2:
        for pair, output in permutations(rest):
            if matrices[pair][1] == 2 * width and matrices[output][0] == width:
                return parts | {pair: (("k", width), ("v", width)), output: (("o", matrices[output][1]),)}
    return {}


def _fused(tree: Tree, path: str, matrices: dict[str, tuple[int, int]]) -> _Parts:
    """One linear layer for q, k and v: as wide as the output's input (q) and an even rest (k, v)."""
    if len(matrices) != 2 or not tree.is_plain(path):
        return {}
    module = tree.modules[path]
    says_heads = has_heads(module) or ATTENTION_NAMES.search(type(module).__name__)
    for fused, output in (tuple(matrices), tuple(reversed(matrices))):
        if not says_heads and not ATTENTION_NAMES.search(fused.rpartition(".")[2]):
            continue
        (width_in, total), (queries, width_out) = matrices[fused], matrices[output]
        rest = total - queries
        if width_in == width_out and 0 < rest <= 2 * queries and rest % 2 == 0:
            parts = (("q", queries), ("k", rest // 2), ("v", rest // 2))
            return {fused: parts, output: (("o", width_out),)}
    return {}


def _of_linear(
    attention: str, child: str, module: nn.Module, parts: tuple[tuple[str, int], ...], interleaved: bool
) -> dict[tuple[str, str], Projection]:
    """A linear layer's weight and bias: the bias follows the weight."""
    interleaved = interleaved and len(parts) > 1
    return {
        (child, "weight"): Projection(attention, parts, output_dim(module), interleaved),
        (child, "bias"): Projection(attention, parts, 0, interleaved),
    }


def _torch_attention(path: str, module: nn.MultiheadAttention) -> dict[tuple[str, str], Projection]:
    width = module.embed_dim
    qkv = (("q", width), ("k", width), ("v", width))
    output = f"{path}.out_proj" if path else "out_proj"
    found = {(path, leaf): Projection(path, qkv, 0) for leaf in ("in_proj_weight", "in_proj_bias")}
    # bias_k and bias_v (1, 1, width) are a key and a value appended to the sequence.
    singles = {"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v", "bias_k": "k", "bias_v": "v"}
    found |= {(path, leaf): Projection(path, ((part, width),), 0) for leaf, part in singles.items()}
    found |= _of_linear(path, output, module.out_proj, (("o", width),), interleaved=False)
    return found


def _named(path: str, names: re.Pattern[str]) -> bool:
    return names.fullmatch(path.rpartition(".")[2]) is not None


def _is_interleaved(module: nn.Module, child: str) -> bool:
    key = f"{type_before_parametrizations(module).__name__}.{child.rpartition('.')[2]}"
    return any(pattern.fullmatch(key) for pattern in INTERLEAVED)


def is_attention_like(tree: Tree, path: str) -> bool:
    """Whether a module looks like an attention, recognised or not: nothing in it is feed-forward."""
    module = tree.modules[path]
    named = (type(module).__name__, path.rpartition(".")[2])
    return has_heads(module) or any(ATTENTION_NAMES.search(name) for name in named)
