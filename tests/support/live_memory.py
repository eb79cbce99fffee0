"""Count the bytes of tensors that a block of code makes and that are alive at the same time, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Count the storages that operators make, backward passes included. It does not depend on an allocator.

    Attributes:
        peak: the most bytes that were alive after an operator.

    Example::

        with LiveMemory(model) as memory:
            measure(model)
        assert memory.peak <= 100_000
    """

    def __init__(self, *models: torch.nn.Module) -> None:
        super().__init__()
        before = [t for m in models for t in (*m.parameters(), *m.buffers())]
        before += [p.grad for m in models for p in m.parameters() if p.grad is not None]
        self._before = {t.untyped_storage().data_ptr() for t in before}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                if storage.data_ptr() not in self._before:
                    reference = StorageWeakRef(storage)
                    self._alive[reference.cdata] = (reference, storage.nbytes())
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return results
