"""Find how the matrices of a parameter are stored: which dimension counts outputs, and how Adam-mini partitions it.

Muon uses the output dimension, Adam-mini the partition.
"""

from __future__ import annotations

import re

from blockwise_lr.blocks.block import Block, Structure
from blockwise_lr.blocks.known_layouts import HEADS, setting
from blockwise_lr.blocks.layout import Projection
from blockwise_lr.blocks.model_facts import ModelFacts
from blockwise_lr.blocks.topology import CONVOLUTIONS, Site, output_dim, table_shape

# Linear attentions have as many heads of queries as of keys.
_HEADS = (*HEADS, "num_k_heads", "num_attn_heads")
_KEY_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_query_groups", "n_query_groups",
    "kv_n_heads",
)  # fmt: skip
# These make the low-rank latent of the queries in MLA. Another matrix makes the heads from it.
_LOW_RANK = {"q_a_proj", "wq_a"}
# Classes of experts whose matrices are (inputs, outputs) although they have no `is_transposed`.
_TRANSPOSED = {"Llama4TextExperts"}
# Names of down projections: their outputs have the model's width.
_NARROWS = re.compile(r"(^|_)(down|w2|wo|fc2|linear2|fc_out|out|output|c_proj|h)(_|$)|(^|_)to_(h|out)$")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


def structure_of(site: Site, block: Block, facts: ModelFacts) -> Structure:
    """Return how the matrices of the parameter at a site are stored.

    Args:
        site: the first place where the parameter is used.
        block: the block of the parameter.
        facts: facts about the model.
    """
    output = _output_dim(site, block, facts)
    return Structure(output, _partition(site, block, facts, output))


def _output_dim(site: Site, block: Block, facts: ModelFacts) -> int:
    """Return the dimension that counts outputs.

    A stack of experts (experts, a, b) tells how it is stored by its class's ``is_transposed``. Without this attribute,
    the side with the model's width is the inputs; for a down projection, known by its name, it is the outputs.
    In all other cases, and for vectors and convolutions, outputs are rows, as in ``nn.Linear``.
    """
    if site.param.ndim < 3:
        return output_dim(site.module) if site.param.ndim == 2 else 0
    if isinstance(site.module, CONVOLUTIONS):
        return 0
    rows, columns = site.param.ndim - 2, site.param.ndim - 1
    transposed = getattr(site.module, "is_transposed", None)
    if transposed is None:
        transposed = site.type_name in _TRANSPOSED or _is_stored_by_inputs(site, block, facts)
    return columns if transposed else rows


def _is_stored_by_inputs(site: Site, block: Block, facts: ModelFacts) -> bool:
    """Return whether the matrices of a stack are (inputs, outputs), by the model's width and the stack's name."""
    if block not in (Block.FFN, Block.HEAD):
        return False
    tables = (table_shape(facts.tree.modules[path]) for path in facts.embeddings)
    widths = facts.configured(*_WIDTHS) | {shape[1] for shape in tables if shape}
    rows, columns = (size in widths for size in site.param.shape[-2:])
    if rows == columns:  # no side has the model's width, or both have
        return False
    name = site.leaf if site.leaf != "weight" else site.child
    narrows = block is Block.FFN and _NARROWS.search(name.lower()) is not None
    return columns if narrows else rows


def _partition(site: Site, block: Block, facts: ModelFacts, output: int) -> tuple[int, ...] | None:
    """Return the number of Adam-mini's pieces along each dimension; None if it is unknown (see Structure)."""
    shape = tuple(site.param.shape)
    is_bias = site.leaf.endswith("bias")  # biases of experts are stacked, so they may have two dimensions
    if sum(size > 1 for size in shape) < 2 or is_bias:
        return (1,) * len(shape) if block is Block.NORM and not is_bias else shape
    if block is Block.QKV:
        return None
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
    """Return the number of heads whose queries or keys a matrix makes; None if the attention does not tell."""
    attention = facts.tree.modules[projection.attention]
    heads, key_heads = setting(attention, *_HEADS), setting(attention, *_KEY_HEADS)
    part = site.part or projection.parts[0][0]
    queries = _width_of_queries(projection.attention, facts)
    if part == "q" or width == queries:
        return heads if heads and width % heads == 0 else None
    if projection.repeats is not None and projection.repeats in (heads, key_heads):
        return projection.repeats  # the parts alternate head by head
    if not queries:  # another attention makes the queries
        return key_heads if key_heads and width % key_heads == 0 else None
    if not heads or queries % heads:
        return None
    size = queries // heads
    # A key narrower than a head is MLA's rotated part, which all heads share.
    return width // size if width % size == 0 else 1 if width < size else None


def _width_of_queries(attention: str, facts: ModelFacts) -> int:
    """Return the number of outputs of the last query matrix: with low-rank queries, the one that makes the heads."""
    widths = [
        width
        for (_, leaf), projection in facts.projections_of(attention)
        if leaf != "bias"
        for part, width in projection.parts
        if part == "q"
    ]
    return widths[-1] if widths else 0
