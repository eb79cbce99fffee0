"""Compile the repeated layers of a run's model: the compiler then works on one layer and not on the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize


def compile_layers(model: nn.Module, **options: Any) -> list[nn.Module]:
    """Compile each repeated layer of a model, and its loss function, in place.

    All layers of one class have the same graph, so the compiler works once for each class. Embedding, final norm and
    output head run uncompiled. Names of parameters and keys of checkpoints stay as they are.

    Call this function after ``split_fused``, and before the model is wrapped in DDP or FSDP.

    Args:
        model: a model of transformers. If it has no repeated layers, it is compiled as a whole.
        options: arguments of ``torch.compile``.

    Returns:
        The compiled modules.
    """
    layers = repeated_layers(model)
    _share_classes(layers)
    for layer in layers or [model]:
        layer.compile(**options)
    if layers and (loss := getattr(model, "loss_function", None)) is not None:
        # In one pass over the logits, which are the largest tensors of a small model.
        model.loss_function = torch.compile(cast("Callable[..., Any]", loss), **options)  # type: ignore[assignment]
    return layers or [model]


@contextmanager
def run_eagerly(model: nn.Module) -> Iterator[None]:
    """Run a model's compiled modules uncompiled in this block: another mode or shape would be compiled again."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:  # set_stance would import the compiler, which takes seconds
        yield


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that a model repeats: the children of each outermost ModuleList whose children are alike.

    Example:
        >>> len(repeated_layers(nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))))
        2
    """
    found: list[nn.Module] = []
    for child in model.children():
        layers = list(child.children())
        if type(child) is nn.ModuleList and len({type(layer) for layer in layers}) == 1:
            found += layers
        else:
            found += repeated_layers(child)
    return found


def _share_classes(layers: Sequence[nn.Module]) -> None:
    """Let split modules of one kind share a class, as deep copies of a split module do.

    torch gives every parametrized module a class of its own, and the compiler would compile each class again. After
    this call, no further tensor of a single module can be parametrized.
    """
    shared: dict[Any, type[nn.Module]] = {}
    for module in (module for layer in layers for module in layer.modules()):
        if parametrize.is_parametrized(module):
            names = tuple(getattr(module, "parametrizations"))  # noqa: B009 (nn.Module types it as a Tensor)
            kind = (parametrize.type_before_parametrizations(module), names)
            module.__class__ = shared.setdefault(kind, type(module))
