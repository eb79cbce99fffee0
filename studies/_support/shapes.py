"""The models that studies train on one text, by name: small enough for a core."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from blockwise_lr.blocks import Block, BlockMap, classify
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig

VOCABULARY, CONTEXT = 3072, 128
"""Tokens of the text's vocabulary, and of a window."""

LLAMAS: Mapping[str, ModelConfig] = {
    "llama-600k": ModelConfig("llama", hidden_size=64, layers=4, heads=1),
    "llama-2m": ModelConfig("llama", hidden_size=128, layers=4, heads=2),
    "llama-6m": ModelConfig("llama", hidden_size=256, layers=4, heads=4),
    # For trials of the code.
    "tiny": ModelConfig("llama", hidden_size=16, layers=2, heads=2, vocab_size=64, context=16),
}
"""The quickstart's LLaMA (1.8M parameters), the same at half and twice the width (0.6M, 5.8M), and one for tests."""

OTHERS: dict[str, Callable[[], PreTrainedModel]] = {}
"""Models that a study adds, each a function without arguments that builds one with new weights."""

OVERRIDES: dict[str, dict[str, Block]] = {}
"""Where a study puts parameters of such a model into another block than `classify` does, by pattern."""


def build(shape: str, *, seed: int) -> PreTrainedModel:
    """Build a model with new weights, the same for the same seed.

    Raises:
        KeyError: there is no model of that name.
    """
    if shape in LLAMAS:
        return build_model(LLAMAS[shape], seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OTHERS[shape]()


def blocks_of(shape: str, model: PreTrainedModel) -> BlockMap:
    """Return the block of every parameter, by `classify` and the overrides of the shape."""
    return classify(model, OVERRIDES.get(shape))
