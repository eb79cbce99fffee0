"""Run a model to see its layouts: whether it can be run, on which batch, and how its buffers are restored."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule"}
# Models that have already run on a random batch.
_MODELS_RUN: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def has_forward(module: nn.Module) -> bool:
    """Return whether a module can be called. Containers such as nn.ModuleList cannot."""
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__


def is_distributed(module: nn.Module) -> bool:
    """Return whether the module is wrapped or sharded, so that a run or a copy involves other processes."""
    classes = {cls.__name__ for each in module.modules() for cls in type(each).__mro__}
    return bool(classes & _WRAPPERS) or any(hasattr(p, "placements") for p in module.parameters())


def real_device() -> AbstractContextManager[object]:
    """Return a context in which new tensors have memory, even if the default device is meta."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def random_batch(model: nn.Module, vocabularies: Callable[[], set[int]]) -> Tensor | None:
    """Return a batch of random tokens or images for a run of the model.

    Args:
        model: the model.
        vocabularies: returns the sizes of the model's vocabularies; the smallest one limits the tokens.

    Returns:
        The batch; None if the model accepts neither, cannot be run here, or has got a batch before: one run is enough.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta or is_distributed(model):
        return None
    vocabulary = min(vocabularies(), default=0)
    images = getattr(model, "default_cfg", None)  # timm's models keep the image size here
    generator = torch.Generator().manual_seed(0)
    if vocabulary:
        batch = torch.randint(vocabulary, (2, 6), generator=generator, device="cpu")
    elif isinstance(images, Mapping) and "input_size" in images:
        batch = torch.randn(1, *images["input_size"], generator=generator, device="cpu").to(parameter.dtype)
    else:
        return None
    if model in _MODELS_RUN:
        return None
    _MODELS_RUN.add(model)
    return batch.to(parameter.device)


def call_with_example(model: nn.Module, example: Any) -> object:
    """Run the model on an example: a mapping as keywords, a sequence as arguments, anything else as one argument."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, (tuple, list)) and not isinstance(example, Tensor):
        return model(*example)
    return model(example)


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the values of all buffers at the end of the context."""
    # `data` has a version counter of its own, so a backward pass that has saved the buffer does not see the write.
    buffers = [buffer.data for buffer in model.buffers() if _is_writable(buffer)]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, before in zip(buffers, kept):
            buffer.copy_(before)


def _is_writable(buffer: Tensor) -> bool:
    """Return whether torch writes into a tensor: not one made in inference mode, or whose elements share memory."""
    strides = zip(buffer.shape, buffer.stride()) if buffer.layout is torch.strided else [(2, 0)]
    return not buffer.is_inference() and not any(size > 1 and stride == 0 for size, stride in strides)
