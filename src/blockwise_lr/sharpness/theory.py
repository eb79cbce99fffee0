"""The sharpness that the paper's theorems predict for each part, from its norm and size alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from blockwise_lr.blocks import Block, BlockMap
from blockwise_lr.sharpness.parameter_parts import ParameterParts, cut
from blockwise_lr.sharpness.report import SharpnessReport


def predicted_sharpness(model: nn.Module, blocks: BlockMap | None = None) -> dict[str, float]:
    r"""Return the upper bounds of the paper's Theorems 4.1 to 4.3, up to the factor Psi^2 that all parts share.

        matrix, norm gain   1 / (# ||theta||^2)
        token embedding     1 / (# min_i ||w_i||^2)          w_i: the row of token i

    # is the number of elements (D^2, D, and D d in the paper's notation). The bounds follow from gradients that scale
    as 1 / ||theta||, which holds for a block that is multiplied with the next one. Biases are not, so they are left
    out.

    Args:
        model: any classified model, not sharded.
        blocks: its BlockMap. Default: ``classify(model)``.

    Returns:
        Name of the part, as in :attr:`SharpnessReport.per_parameter` -> prediction: positive, and infinite for a
        part of zeros.

    Example:
        >>> model = nn.Sequential(nn.Embedding(2, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
        >>> predicted_sharpness(model)["1.weight"]
        0.0625

    Source: The Sharpness Disparity Principle in Transformers, arXiv 2502.19002, section 4.
    """
    parts = ParameterParts(model, blocks, distributed=False)
    names = iter(parts.parts)
    predicted = {}
    for parameter, slices in zip(parts.parameters, parts.blocks_and_slices()):
        for block, part_slice in slices:
            part, value = next(names), cut(parameter.detach().double(), part_slice)
            if _is_bias(part.name):
                continue
            squared = value.square()
            norm = squared.sum(-1).min() if block is Block.EMB and value.ndim == 2 else squared.sum()
            predicted[part.name] = 1 / (part.numel * float(norm)) if norm > 0 else math.inf
    return predicted


def predicted_by_block(
    report: SharpnessReport, predicted: dict[str, float], blocks: BlockMap
) -> dict[Block, float]:
    """Return the predictions averaged over the elements of each block, as sharpness is.

    Args:
        report: a report of the same model, for the sizes.
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
