"""Histograms of the elements of a block by sharpness, on a logarithmic scale (the paper's density figure)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from blockwise_lr.blocks import Block
from blockwise_lr.distributed import local
from blockwise_lr.sharpness.draws import Draws
from blockwise_lr.sharpness.parameter_parts import ParameterParts

LOWEST, HIGHEST, WIDTH = -24.0, 8.0, 0.1
_BINS = round((HIGHEST - LOWEST) / WIDTH)


class Histogram(NamedTuple):
    """The elements of one block, counted by the decimal logarithm of their sharpness.

    Args:
        start: logarithm at the left edge of the first bin.
        width: width of a bin, in decades.
        counts: number of elements in each bin.
        zeros: elements without a gradient (embedding rows of tokens that did not occur), or below the first bin.
    """

    start: float
    width: float
    counts: list[int]
    zeros: int


class Histograms:
    """The mean squared gradient of every element over all batches, counted by block at the end.

    Each batch contributes the gradients of its last probe.

    Args:
        parts: the parts of the model's parameters.
    """

    def __init__(self, parts: ParameterParts) -> None:
        self._parts = parts
        self._sums = [torch.zeros_like(local(p.detach()), dtype=torch.float32) for p in parts.parameters]
        self._samples: Tensor | int = 0

    def add(self, draws: Draws) -> None:
        """Add a batch: B g^2 of each element, weighted by B."""
        self._samples = self._samples + draws.samples
        for total, gradient in zip(self._sums, draws.gradients or ()):
            # The gradient of the summed loss is B times that of the mean loss, so B (g / B)^2 B = g^2.
            if gradient is not None:
                total.add_(local(gradient).float().square())

    def counts(self) -> dict[Block, Histogram]:
        """Return the histogram of each block, without empty bins at either end."""
        totals: dict[Block, Tensor] = {}
        for i, slices in enumerate(self._parts.blocks_and_slices()):
            for block, part_slice in slices:
                counted = _count(self._parts.own(i, self._sums[i], part_slice) / self._samples)
                totals[block] = totals[block] + counted if block in totals else counted
        if self._parts.sharded:
            for counted in totals.values():
                dist.all_reduce(counted)
        return {block: _trimmed(totals[block].cpu()) for block in Block if block in totals}


def _count(elements: Tensor) -> Tensor:
    """Return (1 + bins) int64 counts. The first counts zeros."""
    logarithms = elements.flatten().double().log10()
    index = ((logarithms - LOWEST) / WIDTH).floor().clamp_(-1, _BINS - 1).nan_to_num_(nan=-1).long() + 1
    return torch.bincount(index, minlength=_BINS + 1)


def _trimmed(counted: Tensor) -> Histogram:
    """Return the histogram without empty bins at either end."""
    zeros, counts = int(counted[0]), counted[1:].tolist()
    filled = [i for i, count in enumerate(counts) if count]
    first, last = (filled[0], filled[-1] + 1) if filled else (0, 0)
    return Histogram(round(LOWEST + first * WIDTH, 6), WIDTH, counts[first:last], zeros)
