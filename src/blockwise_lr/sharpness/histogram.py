"""How the elements of a block differ in sharpness: counts on a logarithmic scale (the paper's density figure)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from blockwise_lr.blocks import Block
from blockwise_lr.distributed import local
from blockwise_lr.sharpness.estimators import Draws
from blockwise_lr.sharpness.parameter_parts import ParameterParts

LOWEST, HIGHEST, WIDTH = -24.0, 8.0, 0.1
_BINS = round((HIGHEST - LOWEST) / WIDTH)


class Histogram(NamedTuple):
    """Elements of one block by the decimal logarithm of their sharpness.

    Args:
        start: logarithm at the left edge of the first bin.
        width: of a bin, in decades.
        counts: elements a bin.
        zeros: elements that no gradient reached (rows of tokens that did not occur), or below the first bin.
    """

    start: float
    width: float
    counts: list[int]
    zeros: int


class Histograms:
    """The mean squared gradient of every element over the batches (the last probe of each), counted at the end.

    Args:
        parts: the model's.
    """

    def __init__(self, parts: ParameterParts) -> None:
        self._parts = parts
        self._sums = [torch.zeros_like(local(p.detach()), dtype=torch.float32) for p in parts.parameters]
        self._samples = 0

    def add(self, draws: Draws) -> None:
        """Add a batch: each element's B g^2, weighted by B."""
        self._samples += draws.samples
        for total, gradient in zip(self._sums, draws.gradients or ()):
            if gradient is not None:  # gradients are of the summed loss: B (g / B)^2 B = g^2
                total.add_(local(gradient).float().square())

    def counts(self) -> dict[Block, Histogram]:
        """The histogram of each block, bins without elements at either end left out."""
        totals: dict[Block, Tensor] = {}
        for i, pieces in enumerate(self._parts.blocks_of_pieces()):
            for block, piece in pieces:
                counted = _count(self._parts.own(i, self._sums[i], piece) / self._samples)
                totals[block] = totals[block] + counted if block in totals else counted
        if self._parts.sharded:
            for counted in totals.values():
                dist.all_reduce(counted)
        return {block: _trimmed(totals[block].cpu()) for block in Block if block in totals}


def _count(elements: Tensor) -> Tensor:
    """(1 + bins) int64: zeros first."""
    logarithms = elements.flatten().double().log10()
    index = ((logarithms - LOWEST) / WIDTH).floor().clamp_(-1, _BINS - 1).nan_to_num_(nan=-1).long() + 1
    return torch.bincount(index, minlength=_BINS + 1)


def _trimmed(counted: Tensor) -> Histogram:
    zeros, counts = int(counted[0]), counted[1:].tolist()
    filled = [i for i, count in enumerate(counts) if count]
    first, last = (filled[0], filled[-1] + 1) if filled else (0, 0)
    return Histogram(round(LOWEST + first * WIDTH, 6), WIDTH, counts[first:last], zeros)
