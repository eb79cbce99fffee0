"""The scale of each block at the start of a run, from the model's initializers, without its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from blockwise_lr.blocks import Block, classify
from blockwise_lr.optim.initial_scales import scales_of_rms
from blockwise_lr.optim.recorded_initializers import RecordedInitializers, initial_rms, rms_by_block
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def initial_rms_of(build: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, float | None]]:
    """Build a model, and return it with the RMS of each parameter before training.

    Args:
        build: returns the model, usually on the meta device, where the initializers are followed without values.

    Returns:
        The model, and the RMS by parameter name. It is None where the initial values are not known.
    """
    with RecordedInitializers() as recorded:
        model = build()
        if any(parameter.is_meta for parameter in model.parameters()):
            try:
                for part in _of_transformers(model):
                    _initialize(part)
            except Exception:  # the initializer may need values, and code of the Hub may raise any error
                recorded = RecordedInitializers()
    return model, initial_rms(model, recorded)


def _of_transformers(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the outermost models of transformers in a module, which may be the module itself."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from _of_transformers(child)


def _initialize(model: PreTrainedModel) -> None:
    """Run the initializers, which transformers leaves out on the meta device."""
    model.initialize_weights()  # type: ignore[no-untyped-call]
    # transformers ties a head to the embedding after this, so a tied weight starts as the embedding does.
    model._init_weights(model.get_input_embeddings())  # type: ignore[no-untyped-call]


@cache
def _scales(config: ModelConfig) -> tuple[tuple[Block, float], ...]:
    def build() -> nn.Module:
        with torch.device("meta"):
            return build_model(config, seed=0)

    model, rms = initial_rms_of(build)
    return tuple(scales_of_rms(rms_by_block(rms, classify(model))).items())


def initial_scales_of(config: ModelConfig) -> dict[Block, float]:
    """Return the initial scale of each block of a run's model, as ``initial_scales`` measures it on the weights.

    Example:
        >>> initial_scales_of(ModelConfig(family="gpt2", layers=12))[Block.FFN]
        0.014
    """
    return dict(_scales(config))
