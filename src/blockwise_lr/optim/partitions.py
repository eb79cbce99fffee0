"""Into which pieces Adam-mini cuts a parameter: one second moment for each head of queries and keys, or each output."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.blocks.interleaved import HEADS, setting
from blockwise_lr.blocks.model import ModelFacts
from blockwise_lr.blocks.projection import Projection
from blockwise_lr.blocks.topology import CONVOLUTIONS, Site
from blockwise_lr.optim.orientation import output_dim_of

Partition = tuple[int, ...]
"""Into how many equal pieces each dimension of a parameter is cut."""

# Linear attentions have as many heads of queries as of keys.
_HEADS = (*HEADS, "num_k_heads", "num_attn_heads")
_KEY_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_query_groups", "n_query_groups",
    "kv_n_heads",
)  # fmt: skip
# They make a latent of the queries, of which another matrix makes heads (MLA).
_LOW_RANK = {"q_a_proj", "wq_a"}


def partitions(model: nn.Module, blocks: BlockMap) -> dict[str, Partition | None]:
    """How Adam-mini cuts every trainable parameter.

    - queries and keys: by head, along the dimension of the outputs, whichever that is;
    - every other matrix, embeddings (a row is a token) and each expert of a stack: by output;
    - a norm's gain: not at all;
    - biases and other vectors: by element, so that their update is Adam's.

    Args:
        model: the model, split or not, wrapped or not, on any device.
        blocks: its BlockMap.

    Returns:
        By name, one number for each of the parameter's dimensions: the pieces along it. (12, 1) cuts a (768, 768)
        matrix of queries into 12 heads of 64 outputs; (768, 1) cuts one of values into its outputs. None where it
        cannot be known: a fused weight that was not split, or an attention that does not say how many heads it has.

    Example:
        >>> from blockwise_lr import classify, split_fused
        >>> attention = split_fused(nn.MultiheadAttention(8, num_heads=2, bias=False))
        >>> list(partitions(attention, classify(attention)).values())  # output, queries, keys, values
        [(8, 1), (2, 1), (2, 1), (8, 1)]

    Source: Adam-mini, arXiv 2406.16793, algorithm 3: one second moment for each smallest dense block of the Hessian.
    """
    facts = ModelFacts(model)
    return {name: _partition(sites[0], blocks[name], facts) for name, sites in facts.tree.sites.items()}


def spread(value: Tensor, shape: Sequence[int]) -> Tensor:
    """One number for each piece, repeated over the piece.

    Args:
        value: by piece, of as many dimensions as the parameter.
        shape: the parameter's, a multiple of value's in each dimension.

    Example:
        >>> import torch
        >>> spread(torch.tensor([[1.0], [2.0]]), (4, 1)).flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    for dim, size in enumerate(shape):
        if value.shape[dim] != size:
            value = value.repeat_interleave(size // value.shape[dim], dim)
    return value


def _partition(site: Site, block: Block, facts: ModelFacts) -> Partition | None:
    shape = tuple(site.param.shape)
    if sum(size > 1 for size in shape) < 2 or site.leaf.endswith("bias"):  # experts' biases lie in a stack
        return (1,) * len(shape) if block is Block.NORM and not site.leaf.endswith("bias") else shape
    if block is Block.QKV:
        return None
    output = output_dim_of(site, block, facts)
    pieces: int | None = shape[output]
    projection = facts.projection(site)
    if block is Block.QK and projection is not None and site.child not in _LOW_RANK:
        pieces = _heads(site, projection, shape[output], facts)
    if pieces is None:
        return None
    stacked = 0 if isinstance(site.module, CONVOLUTIONS) else len(shape) - 2
    cut = (size if dim < stacked else 1 for dim, size in enumerate(shape))
    return tuple(pieces if dim == output else one for dim, one in enumerate(cut))


def _heads(site: Site, projection: Projection, width: int, facts: ModelFacts) -> int | None:
    """How many heads a matrix makes the queries or the keys of; None if the attention does not say."""
    attention = facts.tree.modules[projection.attention]
    heads, key_heads = setting(attention, *_HEADS), setting(attention, *_KEY_HEADS)
    part = site.part or projection.parts[0][0]
    queries = _width_of_queries(projection.attention, facts)
    if part == "q" or width == queries:
        return heads if heads and width % heads == 0 else None
    if projection.repeats is not None and projection.repeats in (heads, key_heads):
        return projection.repeats  # head by head
    if not queries:  # made elsewhere
        return key_heads if key_heads and width % key_heads == 0 else None
    if not heads or queries % heads:
        return None
    size = queries // heads
    # MLA's rotated part of the key, which all heads share, is narrower than a head.
    return width // size if width % size == 0 else 1 if width < size else None


def _width_of_queries(attention: str, facts: ModelFacts) -> int:
    """Outputs of the matrix that makes the heads' queries: of the last, where a low-rank one feeds it."""
    widths = [
        width
        for (_, leaf), projection in facts.projections.items()
        if projection.attention == attention and leaf != "bias"
        for part, width in projection.parts
        if part == "q"
    ]
    return widths[-1] if widths else 0
