"""Cached layouts of attentions that were run, for attentions with equal settings."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from blockwise_lr.blocks.layout import Layout

# Cached results of runs, by attention: its settings, and for each of its linear layers the layout, or the reason why a
# run did not show the layout.
_RESULTS_OF_RUNS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Layout | str]]] = (
    weakref.WeakKeyDictionary()
)


def cached_results(attention: nn.Module, settings: Any) -> dict[str, Layout | str]:
    """Return the cached results of an attention, unless its settings have changed since the run."""
    before, results = _RESULTS_OF_RUNS.get(attention, (None, {}))
    return results if before == settings else {}


def cache_results(attention: nn.Module, settings: Any, results: dict[str, Layout | str]) -> None:
    """Store the results of an attention, as long as the module exists."""
    _RESULTS_OF_RUNS[attention] = settings, results


def settings_of(attention: nn.Module) -> Any:
    """Return what determines the layouts of an attention. Two attentions with equal settings have equal layouts."""
    own = {
        name: value for name, value in attention.__dict__.items() if name != "training" and name[:1] != "_"
    }
    plain = (bool, int, float, str, type(None))
    values = tuple(
        (name, repr(value) if isinstance(value, plain) else id(value)) for name, value in own.items()
    )
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in attention.named_parameters())
    inside = tuple((name, type(module)) for name, module in attention.named_modules())
    return type_before_parametrizations(attention), values, shapes, inside
