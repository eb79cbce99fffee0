"""Which dimension of a matrix counts its outputs: the rows of a Linear, the columns of Conv1D and of some experts."""

from __future__ import annotations

import re

from torch import nn

from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.blocks.model import ModelFacts
from blockwise_lr.blocks.topology import CONVOLUTIONS, Site, output_dim, table_shape

# Experts whose matrices are (inputs, outputs), of classes that do not say so by `is_transposed`.
_TRANSPOSED = {"Llama4TextExperts"}
# Names of the matrices that lead back to the width of the model; all others lead away from it.
_NARROWS = re.compile(r"(^|_)(down|w2|wo|fc2|linear2|fc_out|out|output|c_proj|h)(_|$)|(^|_)to_(h|out)$")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


def output_dims(model: nn.Module, blocks: BlockMap) -> dict[str, int]:
    """Return, by trainable parameter's name, the dimension that counts the outputs of its matrices.

    A stack of experts (experts, a, b) says how it is stored by its class's ``is_transposed``. Without it, the side
    as long as the model is wide is the inputs, or the outputs of a matrix that its name calls a down projection.
    Where neither decides, and for vectors and convolutions, outputs are rows, as in ``nn.Linear``.

    Args:
        model: the model, split or not, wrapped or not, on any device.
        blocks: its BlockMap.

    Example:
        >>> from blockwise_lr import classify
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
        >>> output_dims(model, classify(model))
        {'0.weight': 0, '1.weight': 0}
    """
    facts = ModelFacts(model)
    return {name: output_dim_of(sites[0], blocks[name], facts) for name, sites in facts.tree.sites.items()}


def output_dim_of(site: Site, block: Block, facts: ModelFacts) -> int:
    """Return the dimension of one parameter that counts outputs; as :func:`output_dims`."""
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
    """Whether the matrices of a stack are (inputs, outputs), by the model's width and the stack's name."""
    if block not in (Block.FFN, Block.HEAD):
        return False
    tables = (table_shape(facts.tree.modules[path]) for path in facts.embeddings)
    widths = facts.configured(*_WIDTHS) | {shape[1] for shape in tables if shape}
    rows, columns = (size in widths for size in site.param.shape[-2:])
    if rows == columns:  # neither side is known to be the model's, or both may be
        return False
    name = site.leaf if site.leaf != "weight" else site.child
    narrows = block is Block.FFN and _NARROWS.search(name.lower()) is not None
    return columns if narrows else rows
