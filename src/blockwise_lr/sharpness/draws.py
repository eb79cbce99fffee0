"""Draws: what an estimator measured on one batch, on the device until the measurement ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockwise_lr.sharpness.predictions import check_counts


@dataclass(frozen=True)
class Draws:
    """The draws from one batch, on the model's device.

    Args:
        sums: (probes, parts) float64, estimates of tr(H_b) times the number of samples.
        rows: (micro-batches, 3) float64, as :meth:`Predictions.row_counts`, over all processes.
        gradients: gradients of the loss summed over the samples, from the last probe, for histograms of elements.
            None if they were not kept.
    """

    sums: Tensor
    rows: Tensor
    gradients: Sequence[Tensor | None] | None = None

    @property
    def samples(self) -> Tensor:
        """B, the number of samples over all processes and micro-batches, as a tensor on the device."""
        return self.rows[:, 0].sum()


def traces_on_host(
    draws: Sequence[Draws], *, may_be_empty: bool
) -> tuple[list[npt.NDArray[np.float64]], list[int]]:
    """Return the (probes, parts) traces and the number of samples of every batch.

    The host waits for the device once.

    Args:
        draws: the draws of all batches.
        may_be_empty: accept micro-batches without labels that count, if there are others.

    Raises:
        ValueError: no label of a batch counts, or as :func:`check_counts`.
    """
    flat = torch.cat([each for draw in draws for each in (draw.sums.flatten(), draw.rows.flatten())])
    values = np.array(flat.tolist())
    traces, samples, at = [], [], 0
    for draw in draws:
        sums, at = values[at : at + draw.sums.numel()].reshape(draw.sums.shape), at + draw.sums.numel()
        rows, at = values[at : at + draw.rows.numel()].reshape(draw.rows.shape), at + draw.rows.numel()
        for counts in rows:
            check_counts(*counts, may_be_empty=may_be_empty)
        samples.append(int(rows[:, 0].sum()))
        check_counts(samples[-1], 0, 0, may_be_empty=False)
        traces.append(sums / samples[-1])
    return traces, samples
