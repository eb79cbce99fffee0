"""Draw classes from a softmax, faster than by its distribution function in float64, and the numbers that decide."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockwise_lr.fp32 import HALF
from blockwise_lr.sharpness.tensor_sums import to_device

_CHUNK = 1 << 20  # number of logits processed at a time on a CPU, so that they stay in the cache
_SHARE = 0.25  # of a GPU's free memory
_BYTES = 12  # for each logit: its copy in float32, its exponential, and temporary values


def classes_at(logits: Tensor, u: Tensor) -> Tensor:
    """Return for each row the class at which the distribution function of its softmax passes u.

    The search has two steps: a group of neighbouring classes, then a class in the group. So only the sums over
    groups and the running sum within one group are in float64. The exponentials of 50 000 classes and their running
    sum would take ten times as long in float64. In float32, a running sum over all classes would shift labels at the
    tail of the distribution.

    Rows are taken in chunks: as many as stay in a CPU's cache, or as fit into a quarter of a GPU's free memory. The
    size of a chunk does not change a class on a CPU. A GPU may add up a chunk of few rows in another order, so a class
    can change where u is within rounding of the border between two.

    Args:
        logits: (rows, classes), finite or -inf. A row with NaN or inf gets any class.
        u: (rows,) float64, in [0, 1).

    Returns:
        (rows,) class indices. None has probability 0.

    Example:
        >>> classes_at(torch.tensor([[0.0, 0.0, -torch.inf, 0.0]] * 3), torch.tensor([0.1, 0.5, 0.9]).double())
        tensor([0, 1, 3])
    """
    count, classes = logits.shape
    size = 8 * math.ceil(math.sqrt(classes) / 8)
    groups = math.ceil(classes / size)
    rows = max(1, min(_rows_at_a_time(logits), count))
    kind = torch.float32 if logits.dtype in HALF else logits.dtype
    weights = torch.zeros(rows, groups * size, dtype=kind, device=logits.device)
    drawn = []
    for start in range(0, count, rows):
        chunk = logits[start : start + rows].to(kind)
        found = weights[: len(chunk)]
        torch.sub(chunk, chunk.amax(-1, keepdim=True), out=found[:, :classes]).exp_()
        grouped = found.view(len(chunk), groups, size)
        sums = grouped.sum(-1).double()
        upto = sums.cumsum(-1)
        group, at = _passed(upto, u[start : start + rows].unsqueeze(1))
        of_group = sums.gather(1, group)
        share = (at - (upto.gather(1, group) - of_group)) / of_group
        members = grouped.gather(1, group.unsqueeze(2).expand(-1, 1, size)).squeeze(1)
        member, _ = _passed(members.double().cumsum(-1), share.clamp_(0, 1))
        drawn.append((group * size + member).squeeze(1))
    # A row with NaN never passes u, and may end in the padding of the last group.
    return torch.cat(drawn).clamp_(max=classes - 1) if drawn else logits.new_empty(0, dtype=torch.int64)


def _passed(upto: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row of running sums the first entry above a share of the total, and that share of the total.

    The entry always adds something to the sum, whatever the rounding.
    """
    whole = upto[:, -1:]
    at = torch.minimum(share * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(upto, at, right=True).clamp_(max=upto.shape[1] - 1), at


class SampleNumbers:
    """A random number in [0, 1) for each sample, which depends only on the seed and the number of samples before it.

    So padding and the numbers of processes and micro-batches do not matter. A sample is a row that counts.

    Args:
        seed: the seed, as one or several numbers.
    """

    def __init__(self, seed: Sequence[int]) -> None:
        self._generator = np.random.default_rng(seed)
        self._drawn = np.empty(0)
        self._before: Tensor | int = 0
        self._at_most = 0

    def of_micro_batch(self, counted: Tensor, elsewhere: tuple[int, int] | None) -> Tensor:
        """Return the numbers of the next micro-batch, one for each row, without a host sync.

        Args:
            counted: (rows,) bool, False for rows that are no samples.
            elsewhere: the numbers of samples on lower ranks, and on all ranks. None: there is one process.

        Returns:
            (rows,) float64. Rows that do not count have any number.
        """
        first = self._before + (elsewhere[0] if elsewhere else 0)
        self._before = self._before + (elsewhere[1] if elsewhere else counted.sum())
        # The host does not know how many rows count, so it draws a number for each.
        self._at_most += elsewhere[1] if elsewhere else len(counted)
        missing = max(1, self._at_most) - len(self._drawn)
        self._drawn = np.concatenate([self._drawn, self._generator.random(missing)])
        return numbers_of_rows(self._drawn, counted, first)


def numbers_of_rows(numbers: npt.NDArray[np.float64], counted: Tensor, first: Tensor | int) -> Tensor:
    """Return for each row the number of its sample, without a host sync.

    Args:
        numbers: one for each sample, from the first sample of the batch.
        counted: (rows,) bool, False for rows that are no samples. They get any number.
        first: the number of samples before these rows.
    """
    index = (counted.cumsum(0) - 1 + first).clamp_(min=0, max=len(numbers) - 1)
    return to_device(torch.from_numpy(numbers), counted.device).index_select(0, index)


def _rows_at_a_time(logits: Tensor) -> int:
    """Return how many rows to process at a time: all, if memory allows it."""
    classes = logits.shape[1]
    if logits.device.type != "cuda":
        return _CHUNK // classes
    free, _ = torch.cuda.mem_get_info(logits.device)
    cached = torch.cuda.memory_reserved(logits.device) - torch.cuda.memory_allocated(logits.device)
    return int(_SHARE * (free + cached)) // (_BYTES * classes)
