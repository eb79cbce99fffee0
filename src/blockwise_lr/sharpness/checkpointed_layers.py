"""Keep gradient checkpointing on while a model of transformers is measured in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

_RUN = "_gradient_checkpointing_func"  # set by transformers on each module that has a flag `gradient_checkpointing`


@contextmanager
def checkpointing_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Checkpoint the layers of a model that is in eval mode, if checkpointing was enabled for its training.

    transformers checkpoints a layer in training mode alone. Inside the context, each such layer counts as training
    until its forward pass begins, so its dropout stays off. Checkpoints are not reentrant: a reentrant one supports
    neither ``torch.autograd.grad`` nor a double backward pass. The layers are restored afterwards.

    Args:
        model: a model in eval mode. Its own checkpointing functions are called, with ``use_reentrant=False`` if they
            take this option.
    """
    layers = [module for module in model.modules() if _is_checkpointed_layer(module)]
    kept = [module.__dict__.get(_RUN) for module in layers]
    for layer in layers:
        setattr(layer, _RUN, _in_eval_mode(layer, getattr(layer, _RUN)))
        layer.training = True
    try:
        yield
    finally:
        for layer, run in zip(layers, kept):
            layer.training = False
            if run is None:
                delattr(layer, _RUN)
            else:
                setattr(layer, _RUN, run)


def _is_checkpointed_layer(module: nn.Module) -> bool:
    """Return whether a module checkpoints its own forward pass in training mode."""
    # Compare the name, because importing transformers takes seconds. Models have the same flag, for their layers.
    is_layer = any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)
    return is_layer and bool(getattr(module, "gradient_checkpointing", False)) and hasattr(module, _RUN)


def _in_eval_mode(layer: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a checkpointing function that runs the layer in eval mode, forward and when it is recomputed."""
    if run is checkpoint or (isinstance(run, partial) and "use_reentrant" in run.keywords):
        run = partial(run, use_reentrant=False)

    def run_in_eval_mode(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def evaluated(*inputs: Any, **options: Any) -> Any:
            layer.training = False
            try:
                return forward(*inputs, **options)
            finally:
                layer.training = True

        # A recomputed layer would write its keys and values into a cache a second time.
        return run(evaluated, *(None if _is_cache(arg) else arg for arg in args), **kwargs)

    return run_in_eval_mode


def _is_cache(value: object) -> bool:
    return hasattr(value, "get_seq_length")
