"""Prepare a model for a measurement: unwrap it, put it in eval mode, and restore it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from blockwise_lr import distributed as processes
from blockwise_lr.blocks.model_runs import restored_buffers
from blockwise_lr.fp32 import fp32_precision
from blockwise_lr.sharpness.checkpointed_layers import checkpointing_in_eval_mode


def unwrapped(model: nn.Module) -> tuple[nn.Module, bool]:
    """Return the model inside DDP and torch.compile, with the same parameters, and whether DDP replicates it."""
    replicated = False
    while True:
        # Compare the name, because importing torch.distributed.fsdp takes seconds.
        if type(model).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) flattens parameters, so their blocks cannot be told apart: "
                "use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model, replicated = model.module, True
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model, replicated


@contextmanager
def measurement_mode(model: nn.Module) -> Iterator[None]:
    """Prepare a model for measuring, and restore it and the random state afterwards.

    Inside the context, the model is in eval mode, matrix products are in full fp32, and compiled modules run eagerly.
    Gradient checkpointing of transformers' layers stays on. Buffers that forward passes write into, such as the
    counters of a mixture of experts, get their values back. Models of transformers keep no cache of keys and states.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(devices)))
        stack.enter_context(restored_buffers(model))
        stack.enter_context(_without_caches(model))
        stack.enter_context(fp32_precision("ieee"))  # rounding to TF32 exceeds the finite differences
        if any(map(_is_compiled, model.modules())):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        try:
            with checkpointing_in_eval_mode(model):
                yield
        except BaseException:
            processes.reset_after_error(model)
            raise
        finally:
            for module, training in modes.items():
                module.training = training


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Switch off ``use_cache`` of transformers' models.

    In eval mode, some write into their cache in place (RWKV, xLSTM). The backward pass then fails.
    """
    held: list[Any] = [module.__dict__.get("config") for module in model.modules()]
    configs = [config for config in held if _caches(config)]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


def _caches(config: Any) -> bool:
    # Compare the name, because importing transformers takes seconds.
    of_transformers = any(kind.__name__.lower() == "pretrainedconfig" for kind in type(config).__mro__)
    return of_transformers and getattr(config, "use_cache", None) is True


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
