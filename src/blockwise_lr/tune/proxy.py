"""The proxy: a narrower and shallower model of the same family, on which the search trains."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from blockwise_lr.errors import UserError
from blockwise_lr.train.build_model import count_parameters
from blockwise_lr.train.config import ModelConfig

TARGET = 2_000_000
"""Parameters of the default proxy, as nearly as a width of at least 64 channels allows."""

_WIDTHS = (64, 96, 128, 160, 192, 256)
_LAYERS = 4


def proxy_model(model: ModelConfig, size: str = "auto") -> ModelConfig:
    """Return the model that the search trains.

    Heads keep their width and the feed-forward layer its ratio to the hidden size, as far as the sizes divide.
    Vocabulary and context stay the same, so the text does, too.

    Args:
        model: the model to find ratios for.
        size: WIDTHxLAYERS such as "128x4"; "none" for the model itself; "auto" for about 2M parameters, or the model
            itself if it has at most 1.25 times as many.

    Raises:
        UserError: the size has another form, or it is larger than the model.

    Example:
        >>> small = proxy_model(ModelConfig(hidden_size=768, layers=12, heads=12), "128x4")
        >>> small.hidden_size, small.layers, small.heads
        (128, 4, 2)
    """
    if size == "none":
        return model
    if size == "auto":
        if count_parameters(model) <= 1.25 * TARGET:
            return model
        return min(_candidates(model), key=lambda proxy: abs(math.log(count_parameters(proxy) / TARGET)))
    parsed = re.fullmatch(r"(\d+)x(\d+)", size)
    if parsed is None:
        raise UserError(f"--proxy is {size!r}; expected WIDTHxLAYERS such as 128x4, auto, or none")
    width, layers = int(parsed[1]), int(parsed[2])
    if not (1 <= width <= model.hidden_size and 1 <= layers <= model.layers):
        raise UserError(
            f"--proxy is {size}; expected a model of at most the size that it stands for, {describe_size(model)}"
        )
    return _shrunk(model, width, layers)


def describe_size(model: ModelConfig) -> str:
    """Return width and layers as text, in the form of `--proxy`."""
    return f"{model.hidden_size}x{model.layers}"


def _candidates(model: ModelConfig) -> Iterator[ModelConfig]:
    for width in _WIDTHS:
        if width <= model.hidden_size:
            yield _shrunk(model, width, min(_LAYERS, model.layers))
    if model.hidden_size < _WIDTHS[0]:
        yield _shrunk(model, model.hidden_size, min(_LAYERS, model.layers))


def _shrunk(model: ModelConfig, width: int, layers: int) -> ModelConfig:
    """Return the model with another width and number of layers."""
    heads = max(1, round(width * model.heads / model.hidden_size))
    while width % heads or (width // heads) % 2:  # rotary positions turn the channels of a head in pairs
        heads -= 1
        if heads < 1:
            raise UserError(f"--proxy has width {width}; expected an even one")
    kv_heads = None
    if model.kv_heads is not None:
        kv_heads = max(1, round(heads * model.kv_heads / model.heads))
        while heads % kv_heads:
            kv_heads -= 1
    ffn_size = None if model.ffn_size is None else max(1, round(model.ffn_size * width / model.hidden_size))
    return replace(model, hidden_size=width, layers=layers, heads=heads, kv_heads=kv_heads, ffn_size=ffn_size)
