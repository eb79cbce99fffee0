"""Data sets of token windows: an endless stream for training, and a fixed set for evaluation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from blockwise_lr.data.shards import TokenShards
from blockwise_lr.errors import UserError


def require_window(shards: TokenShards, context: int) -> None:
    """Check that a split holds at least one window of `context` tokens.

    Raises:
        UserError: the split is too short.
    """
    if shards.n_tokens < context:
        raise UserError(
            f"too little text: the split {shards.split} of {shards.source} has {shards.n_tokens} tokens, "
            f"one window needs {context}: give more text or a shorter context"
        )


def _sample(shards: TokenShards, window: int, context: int) -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(shards.read(window * context, context))
    # transformers' models shift the labels themselves.
    return {"input_ids": tokens, "labels": tokens.clone()}


class TrainingStream(Dataset[dict[str, torch.Tensor]]):
    """Training windows over any number of epochs, in an order that only the seed decides.

    Sample i is window perm(i // n)[i % n] of the n complete windows, where perm(epoch) is a permutation drawn from
    (seed, epoch). The order does not depend on the batch size, the number of ranks or the step of a resume.

    Args:
        shards: the split, usually `data.train`.
        context: length of a window, in tokens.
        seed: seed of the order.
        n_samples: length of the data set, in windows; may exceed one epoch.

    Raises:
        UserError: the split holds fewer than `context` tokens.

    Example:
        >>> stream = TrainingStream(data.train, 128, seed=0, n_samples=6400)         # doctest: +SKIP
        >>> stream[0]["input_ids"].shape                                             # doctest: +SKIP
        torch.Size([128])
    """

    def __init__(self, shards: TokenShards, context: int, seed: int, n_samples: int) -> None:
        require_window(shards, context)
        self.shards = shards
        self.context = context
        self.seed = seed
        self.n_samples = n_samples
        self.n_windows = shards.n_windows(context)
        self._epoch = -1
        self._order: npt.NDArray[np.uint32] = np.empty(0, np.uint32)

    def __len__(self) -> int:
        return self.n_samples

    def window(self, index: int) -> int:
        """Return the index of the window in the split that is sample `index`."""
        epoch, position = divmod(index, self.n_windows)
        if epoch != self._epoch:
            self._order = np.arange(self.n_windows, dtype=np.uint32)
            np.random.default_rng([self.seed, epoch]).shuffle(self._order)
            self._epoch = epoch
        return int(self._order[position])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `input_ids` and equal `labels`, each (context,) int64. transformers' models shift the labels."""
        if not 0 <= index < self.n_samples:
            raise IndexError(f"sample {index} of {self.n_samples}")
        return _sample(self.shards, self.window(index), self.context)


class FixedWindows(Dataset[dict[str, torch.Tensor]]):
    """A fixed set of windows without overlap: all windows of a split, or some evenly spaced over it.

    Args:
        shards: the split, usually `data.val`.
        context: length of a window, in tokens.
        max_tokens: the largest number of tokens, but at least one window; 0 for the whole split.

    Raises:
        UserError: the split holds fewer than `context` tokens.
    """

    def __init__(self, shards: TokenShards, context: int, max_tokens: int = 0) -> None:
        require_window(shards, context)
        self.shards = shards
        self.context = context
        self.n_windows = shards.n_windows(context)
        self._length = (
            min(self.n_windows, max(1, max_tokens // context)) if max_tokens > 0 else self.n_windows
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `input_ids` and equal `labels`, each (context,) int64."""
        if not 0 <= index < self._length:
            raise IndexError(f"window {index} of {self._length}")
        return _sample(self.shards, index * self.n_windows // self._length, self.context)
