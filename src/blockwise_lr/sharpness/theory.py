"""What the paper's theorems predict for the sharpness of each part, from its norm and size alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.sharpness.parameter_parts import ParameterParts, cut
from blockwise_lr.sharpness.report import SharpnessReport


def predicted_sharpness(model: nn.Module, blocks: BlockMap | None = None) -> dict[str, float]:
    r"""The upper bounds of Theorems 4.1 to 4.3 (METHOD section 2), up to the factor Psi^2 that all parts share.

        matrix, norm gain   1 / (# ||theta||^2)
        token embedding     1 / (# min_i ||w_i||^2)          w_i: the row of token i

    with # the number of elements (D^2, D, and D d in the paper's notation). They follow from gradients that scale
    as 1 / ||theta|| where a block composes with the next by multiplication, so biases have none and are left out.

    Args:
        model: any classified model, not sharded.
        blocks: its BlockMap. Default: ``classify(model)``.

    Returns:
        part's name, as in :attr:`SharpnessReport.per_parameter` -> prediction; positive, infinite for a part of zeros.

    Example:
        >>> model = nn.Sequential(nn.Embedding(2, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
        >>> predicted_sharpness(model)["1.weight"]
        0.0625
    """
    parts = ParameterParts(model, blocks, distributed=False)
    names = iter(parts.parts)
    predicted = {}
    for parameter, pieces in zip(parts.parameters, parts.blocks_of_pieces()):
        for block, piece in pieces:
            part, value = next(names), cut(parameter.detach().double(), piece)
            if _is_bias(part.name):
                continue
            squared = value.square()
            norm = squared.sum(-1).min() if block is Block.EMB and value.ndim == 2 else squared.sum()
            predicted[part.name] = 1 / (part.numel * float(norm)) if norm > 0 else math.inf
    return predicted


def predicted_by_block(
    report: SharpnessReport, predicted: dict[str, float], blocks: BlockMap
) -> dict[Block, float]:
    """The predictions of the parts of each block, averaged over their elements as sharpness is.

    Args:
        report: of the same model, for the sizes.
        predicted: from :func:`predicted_sharpness`.
        blocks: the model's BlockMap.
    """
    found: dict[Block, list[tuple[float, int]]] = {}
    for name, value in predicted.items():
        parameter, _, part = name.partition(":")
        entry = blocks.assignment(parameter)
        block = (entry.parts or {})[part] if part else entry.block
        found.setdefault(block, []).append((value, report.per_parameter[name].numel))
    return {block: _weighted(found[block]) for block in Block if block in found}


def _weighted(values: Iterable[tuple[float, int]]) -> float:
    pairs = list(values)
    return sum(value * n for value, n in pairs) / sum(n for _, n in pairs)


def _is_bias(name: str) -> bool:
    leaf = name.partition(":")[0].rpartition(".")[2]
    return "bias" in name.split(".")[-2:] or leaf.endswith("bias") or ".parametrizations.bias." in name
