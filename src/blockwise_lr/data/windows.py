"""The windows that a trainer reads: an endless stream to train on, a fixed set to evaluate on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from blockwise_lr.data.shards import TokenShards
from blockwise_lr.errors import UserError


def require_window(shards: TokenShards, context: int) -> None:
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
    """Training windows without end, in an order that only the seed decides.

    Sample i is window perm(i // n)[i % n] of the n whole windows, where perm(epoch) is a permutation drawn
    from (seed, epoch): the same whatever the batch size, the number of processes or the point of resuming.

    Args:
        shards: the split, usually `data.train`.
        context: length of a window, in tokens.
        seed: seed of the order.
        n_samples: length of the data set, in windows; it may exceed one epoch.

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
        """Which window of the split sample `index` is."""
        epoch, position = divmod(index, self.n_windows)
        if epoch != self._epoch:
            self._order = np.arange(self.n_windows, dtype=np.uint32)
            np.random.default_rng([self.seed, epoch]).shuffle(self._order)
            self._epoch = epoch
        return int(self._order[position])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`, each (context,) int64 and equal: transformers' models shift labels."""
        if not 0 <= index < self.n_samples:
            raise IndexError(f"sample {index} of {self.n_samples}")
        return _sample(self.shards, self.window(index), self.context)


class FixedWindows(Dataset[dict[str, torch.Tensor]]):
    """Windows without overlap, always the same: the whole split, or evenly spaced over it.

    Args:
        shards: the split, usually `data.val`.
        context: length of a window, in tokens.
        max_tokens: take at most this many tokens (but one window at least); 0: the whole split.

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
        """As `TrainingStream`: `input_ids` and `labels`, each (context,) int64."""
        if not 0 <= index < self._length:
            raise IndexError(f"window {index} of {self._length}")
        return _sample(self.shards, index * self.n_windows // self._length, self.context)
