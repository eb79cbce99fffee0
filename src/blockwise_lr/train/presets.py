"""Presets: the paper's models with the settings of each data set, and the quickstart.

The paper is "The Sharpness Disparity Principle in Transformers", arXiv 2502.19002 (ICML 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.errors import UserError
from blockwise_lr.train.config import (
    ModelConfig,
    OptimConfig,
    TrainConfig,
    identity,
)

_VOCAB = 50_304  # GPT-2's 50 257 tokens, rounded up to a multiple of 64 as in the authors' code


@dataclass(frozen=True, order=True)
class Setting:
    """The hyperparameters that a comparison tunes separately for each arm.

    Args:
        base_lr: peak learning rate of a block whose ratio is 1.
        warmup_fraction: length of the linear warm-up, as a fraction of the steps; None: that of the base configuration.
    """

    base_lr: float
    warmup_fraction: float | None = None

    def __str__(self) -> str:
        warmup = "" if self.warmup_fraction is None else f", warm-up {self.warmup_fraction:.0%}"
        return f"base LR {self.base_lr:g}{warmup}"


@dataclass(frozen=True)
class _DataSet:
    """The settings of one data set in the authors' code."""

    data: DataConfig
    context: int
    steps: int
    floor_fraction: float
    vocab_size: int = _VOCAB


_DATA_SETS = {
    "openwebtext": _DataSet(
        DataConfig(data="Skylion007/openwebtext", tokenizer="gpt2"), 1024, 50_000, 1 / 20
    ),
    "minipile": _DataSet(DataConfig(data="JeanKaddour/minipile", tokenizer="gpt2"), 512, 30_000, 1 / 20),
    "c4": _DataSet(
        DataConfig(
            data="allenai/c4",
            hf_config="en",
            hf_streaming=True,
            tokenizer="t5-base",
            max_documents=12_000_000,
        ),
        256,
        30_000,
        1 / 10,
        32_100,
    ),
}

_MODELS = {
    "gpt2-small": ModelConfig("gpt2", 768, 12, 12, tied=True),
    "gpt2-medium": ModelConfig("gpt2", 1024, 24, 16, tied=True),
    "gpt2-large": ModelConfig("gpt2", 1280, 36, 20, tied=True),
    "gpt2-xl": ModelConfig("gpt2", 1600, 48, 25, tied=True),
    "llama-90m": ModelConfig("llama", 768, 2, 12),
    "llama-134m": ModelConfig("llama", 768, 6, 12),
    "llama-0.23b": ModelConfig("llama", 768, 16, 12),
    "llama-0.25b": ModelConfig("llama", 1024, 8, 16),
    "llama-0.5b": ModelConfig("llama", 1280, 15, 20),
    "llama-0.75b": ModelConfig("llama", 1664, 13, 26),
    "llama-0.9b": ModelConfig("llama", 1600, 18, 25),
    "tinyllama-1.1b": ModelConfig("llama", 2048, 22, 32, kv_heads=4, ffn_size=5632),
}


def _paper_preset(name: str, model: ModelConfig, setting: _DataSet) -> TrainConfig:
    # 15 sequences x 10 accumulation steps on each of the authors' two GPUs make a batch of 300 sequences.
    return TrainConfig(
        preset=name,
        steps=setting.steps,
        batch_size=15,
        accumulation=10,
        log_every=10,
        eval_every=500,
        eval_tokens=2_097_152,
        save_every=1_000,
        model=replace(model, vocab_size=setting.vocab_size, context=setting.context),
        data=setting.data,
        optim=OptimConfig(warmup_fraction=0.02, floor_fraction=setting.floor_fraction),
    )


def _quickstart() -> TrainConfig:
    # Four runs take minutes on two CPU cores. studies/2026-11-quickstart-ratios tuned these values.
    return TrainConfig(
        preset="quickstart",
        steps=300,
        eval_every=30,
        eval_tokens=24_576,
        # Base learning rate and warm-up are those tuned for one rate, which the default ratios take. A search for the
        # uniform baseline chose decay and clipping, and `compare` uses them for every arm. _TUNED has each arm's own
        # base learning rate and warm-up.
        optim=OptimConfig(base_lr=5.66e-3, weight_decay=0.03, warmup_fraction=0.6, clip=0.3),
    )


def _all() -> dict[str, TrainConfig]:
    presets = {"quickstart": _quickstart()}
    for model_name, model in _MODELS.items():
        # A model's name without a suffix stands for the data set of most of the paper's runs.
        for suffix, setting in (("", "openwebtext"), *((f"-{name}", name) for name in _DATA_SETS)):
            name = model_name + suffix
            presets[name] = _paper_preset(name, model, _DATA_SETS[setting])
    return presets


PRESETS: Mapping[str, TrainConfig] = MappingProxyType(_all())
"""Every preset by name. "llama-0.25b" and "llama-0.25b-openwebtext" are the same settings."""


def get_preset(name: str) -> TrainConfig:
    """Return the preset with a given name.

    Args:
        name: a key of :data:`PRESETS`.

    Raises:
        UserError: there is no such preset; the message lists all presets.

    Example:
        >>> get_preset("llama-0.25b-minipile").steps
        30000
    """
    try:
        return PRESETS[name]
    except KeyError:
        models = ", ".join(_MODELS)
        raise UserError(
            f"no preset named {name!r}; there are quickstart, and {models}, each also with "
            f"{', '.join('-' + s for s in _DATA_SETS)} behind it (alone: -openwebtext)"
        ) from None


_ARMS = {"quickstart": ("adamw:uniform", "adamw:half", "adamw:measured")}

# Base learning rate and warm-up, chosen by the tune loss in studies/2026-11-ratio-rules/data/llama-2m. "half" has those
# of uniform: what a user gets who changes nothing but the ratios (studies/2026-11-default-ratios has its own best).
_TUNED: Mapping[str, Mapping[str, Setting]] = MappingProxyType(
    {
        "quickstart": MappingProxyType(
            {
                "adamw:uniform:N": Setting(5.66e-3, 0.6),
                "adamw:uniform:2N": Setting(8e-3, 0.6),
                "adamw:half:N": Setting(5.66e-3, 0.6),
                "adamw:paper:N": Setting(2e-3, 0.6),
                "adamw:measured:N": Setting(2e-3, 0.15),
                "adamw:auto:N": Setting(1.41e-3, 0.15),
            }
        )
    }
)


def arms_of(preset: str) -> tuple[str, ...]:
    """Return the arms that `compare` runs for a preset by default, the baseline first."""
    return _ARMS.get(preset, ("adamw:uniform", "adamw:half"))


def tuned_settings(config: TrainConfig) -> Mapping[str, Setting] | None:
    """Return the settings that are already tuned for this configuration; None if there are none.

    The configuration must have the model, text and number of steps of its preset.

    Returns:
        A mapping from "optimizer:ratios:horizon" to the setting; the horizon is "N" or "2N".

    Example:
        >>> tuned_settings(get_preset("gpt2-small")) is None
        True
    """
    preset = PRESETS.get(config.preset)
    if preset is None or config.preset not in _TUNED:
        return None
    free = {name: getattr(preset, name) for name in ("seed", "device", "precision", "log_every")}
    tuned_for = replace(config, **free)
    return _TUNED[config.preset] if identity(tuned_for) == identity(preset) else None
